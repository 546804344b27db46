"""`apack::append_at`: append tokens whose positions a graph computes, as an exported program does."""
