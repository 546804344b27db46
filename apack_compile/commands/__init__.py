"""What the commands of `apack-compile` do, beside the demo and `inspect`."""
