"""The command line: one file per verb; the only reader of argv and environment."""
