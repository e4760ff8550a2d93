"""Every constant of time of this room."""

from __future__ import annotations

from typing import Final

#: between two signs of life of a host that owes something, and between two looks whether there was one
HEARTBEAT_S: Final = 0.1
#: a host that owes answers and gives no sign of life for so long counts as lost, unless whoever connects says otherwise
SILENT_AFTER_S: Final = 1.0
#: a frontend over TCP that acknowledges nothing for so long is forgotten: its machine or the way to it is gone
FRONTEND_GONE_MS: Final = 10_000
#: the kernel of a host takes a TCP connection at once, or there is no way to it: a lost packet is sent again after a second
TCP_CONNECT_MS: Final = 2_000
#: a unix socket has no way to wait for room in the queue of connections: between two tries
DIAL_RETRY_S: Final = 0.005
#: for what was sent last to leave a TCP socket that is closed: a frontend's, a host's
FRONTEND_LINGER_MS: Final = 100
HOST_LINGER_MS: Final = 200
