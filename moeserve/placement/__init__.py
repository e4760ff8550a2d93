"""Where every physical expert lives: pure functions from sizes to placements; no clock, no I/O."""

from moeserve.placement.memory import expert_bytes, host_bytes
from moeserve.placement.plan import LayerPlacement, Placement, plan_placement

__all__ = ["LayerPlacement", "Placement", "expert_bytes", "host_bytes", "plan_placement"]
