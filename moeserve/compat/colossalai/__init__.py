"""ColossalAI's MoE layer: its parameters, and its classes."""

from moeserve.compat.colossalai.layer import Experts, MoeLayer
from moeserve.compat.colossalai.noise import NormalNoiseGenerator, UniformNoiseGenerator
from moeserve.compat.colossalai.routers import Top1Router, Top2Router
from moeserve.compat.colossalai.table import COLOSSALAI

__all__ = ["COLOSSALAI", "Experts", "MoeLayer", "NormalNoiseGenerator", "Top1Router", "Top2Router", "UniformNoiseGenerator"]
