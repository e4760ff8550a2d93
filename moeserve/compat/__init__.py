"""Configurations and classes of DeepSpeed, ColossalAI, MindFormers and TrustformeRS, on moeserve."""

from moeserve.compat.saving import save_layers
from moeserve.compat.systems import SYSTEMS, load
from moeserve.compat.walk import ImportedConfig, Note

__all__ = ["SYSTEMS", "ImportedConfig", "Note", "load", "save_layers"]
