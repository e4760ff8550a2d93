"""Which experts a token goes to, with what weight, and which of those choices an expert has room for; pure torch."""

from moeserve.gating.gate import apply_choices, route, route_requests
from moeserve.gating.router import Router
from moeserve.gating.routing import BatchRouting, Routing

__all__ = ["BatchRouting", "Router", "Routing", "apply_choices", "route", "route_requests"]
