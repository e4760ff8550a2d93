"""MindFormers' MoEConfig, and what its parameters mean here."""

from moeserve.compat.mindformers.config import MoEConfig
from moeserve.compat.mindformers.table import MINDFORMERS

__all__ = ["MINDFORMERS", "MoEConfig"]
