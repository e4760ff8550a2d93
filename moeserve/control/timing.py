"""How long a controller and the frontends that follow it wait, in seconds."""

from __future__ import annotations

from typing import Final

#: for the first order of a stream
FIRST_ORDER_S: Final = 15.0
#: between two attempts to follow: after a stream with orders, and at most
LEAST_PAUSE_S: Final = 0.2
MOST_PAUSE_S: Final = 5.0
#: for a frontend to tell the controller that it leaves
GOODBYE_S: Final = 2.0
#: beyond a frontend's own time limit, for its report
GRACE_S: Final = 5.0
#: how long hosts accept a frontend whose stream broke: it keeps serving, and comes back
KEEP_KEY_S: Final = 3600.0
#: for connecting to hosts before using a release that is already in force
REACH_S: Final = 5.0
#: between two reports of what callers ask of the experts
DEMAND_S: Final = 1.0
#: until an incarnation of a host that was not reached is tried again, because the network may have failed
PATIENCE_S: Final = 2.0
#: over how long it is measured how busy hosts are; also, how old what a host said of it may be
BUSY_WINDOW_S: Final = 5.0
#: between two times that frontends are told of it
TELL_BUSY_S: Final = 10.0
#: between two checks of nodes and hosts
CONTROL_LOOK_S: Final = 1.0
#: for hosts to hear that a change was withdrawn because the service ends; they end next
ABANDON_S: Final = 5.0
#: between two looks whether hosts that load make progress
STALL_LOOK_S: Final = 0.25
#: after a failed check the pause doubles, up to this
LONGEST_PAUSE_S: Final = 60.0
#: Ray's numbers of free resources may be this old
STALE_S: Final = 2.0
#: between two checks for room on nodes
ROOM_RETRY_S: Final = 0.25
#: for frontends that followed an earlier incarnation to come back
BACK_S: Final = 10.0
