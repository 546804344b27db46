"""`apack::append`: write new tokens into the tail and pack those that it pushes out."""
