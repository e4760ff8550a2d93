"""Which experts a token goes to, with what weight, and which of those choices an expert has room for; pure torch."""

from moeserve.gating.gate import apply_choices, route, route_requests
from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.mixer import Mixer
from moeserve.gating.router import Router
from moeserve.gating.routing import BatchRouting, Routing
from moeserve.gating.routings.plugin import RoutingPlugin
from moeserve.gating.weights import keep_total

__all__ = [
    "BatchRouting",
    "GateInput",
    "Mixer",
    "Router",
    "Routing",
    "RoutingPlugin",
    "Selection",
    "apply_choices",
    "keep_total",
    "route",
    "route_requests",
]
