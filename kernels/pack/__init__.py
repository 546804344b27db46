"""`apack::pack`: tokens of a segment to codes, and how much of them coding loses."""
