"""The cache of durable cells: what a cell's result depends on, and its result on disk."""
