"""The boundary of the service: requests, answers, tensors, and their bytes."""
