"""How long a controller and the frontends that follow it wait, in seconds."""

from __future__ import annotations

from typing import Final

#: for the first order of a stream
FIRST_ORDER_S: Final = 15.0
#: between two attempts to follow: after a stream that was heard, and at most
LEAST_PAUSE_S: Final = 0.2
MOST_PAUSE_S: Final = 5.0
#: for the controller to hear that a frontend leaves
GOODBYE_S: Final = 2.0
#: beyond what a frontend may take anyway, for it to say so
GRACE_S: Final = 5.0
#: how long hosts let in a frontend whose stream broke: it serves on meanwhile, and comes back
KEEP_KEY_S: Final = 3600.0
#: for hosts to be reached before a release is used that is in force anyway
REACH_S: Final = 5.0
#: until an incarnation of a host that was not reached a moment ago is tried again, as it may have been the network
PATIENCE_S: Final = 2.0
#: between two looks at nodes and hosts
CONTROL_LOOK_S: Final = 1.0
#: after a look that failed the pause doubles, up to this
LONGEST_PAUSE_S: Final = 60.0
#: what Ray calls free may be this old
STALE_S: Final = 2.0
#: between two looks at nodes that have no room yet
ROOM_RETRY_S: Final = 0.25
#: for frontends that followed an earlier incarnation to come back
BACK_S: Final = 10.0
