"""The composition roots: they connect the parts and do nothing else."""
