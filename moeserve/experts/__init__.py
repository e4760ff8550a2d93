"""Expert weights of one layer and the grouped pass over them; torch only."""

from moeserve.experts.activations import is_gated
from moeserve.experts.bank import ExpertBank
from moeserve.experts.weights import ExpertWeights

__all__ = ["ExpertBank", "ExpertWeights", "is_gated"]
