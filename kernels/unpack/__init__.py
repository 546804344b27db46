"""`apack::unpack`: every token of a layer, dense, in its original position."""
