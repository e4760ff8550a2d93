"""The composition roots: everything put together, and nothing else."""
