"""Updates of stock caches, and static buffers that packed state can replace."""
