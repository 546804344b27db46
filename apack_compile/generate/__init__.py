"""What optimize puts on a model: its session, generate and the compiled decode step."""
