"""gRPC in front of an engine, which is a protocol here. Its modules are imported one by one: to check a configuration takes no server."""
