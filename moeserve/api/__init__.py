"""What crosses the door: requests, answers, tensors, and their bytes."""
