"""Reading a graph: nodes, what they write and share, views, transposes, dead code."""
