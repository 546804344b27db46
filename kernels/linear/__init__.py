"""`apack::linear`: a linear layer in float32, on CPUs through oneDNN."""
