"""`apack::attend`: attention over a packed cache without unpacking it."""
