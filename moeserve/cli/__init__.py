"""The command line: one file per verb; the only reader of argv and environment."""

import os

# gRPC reads it when it is imported; by default it writes a line for every connection that does not speak TLS.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
