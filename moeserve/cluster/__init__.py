"""What hosts run on: the `Cluster` seam, Ray in `ray_*.py` (nothing else imports it), and threads of this process."""
