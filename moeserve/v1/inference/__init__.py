"""Generated from `protos/inference` by `make protos`; do not edit. `moeserve.server.inference.messages` makes classes of it."""
