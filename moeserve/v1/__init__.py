"""Generated from `protos/moeserve/v1` by `make protos`; do not edit."""
