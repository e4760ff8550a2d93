"""The former name of `moeserve.engines.hf_loader`."""

import sys
from importlib import import_module

sys.modules[__name__] = import_module("moeserve.engines.hf_loader")
