"""Configurations and classes of DeepSpeed, ColossalAI, MindFormers and TrustformeRS, and the function of EPLB, on moeserve."""

from moeserve.compat import eplb
from moeserve.compat.saving import save_layers
from moeserve.compat.systems import SYSTEMS, load
from moeserve.compat.walk import ImportedConfig, Note

__all__ = ["SYSTEMS", "ImportedConfig", "Note", "eplb", "load", "save_layers"]
