"""Every constant of time of this room."""

from __future__ import annotations

from typing import Final

#: between two heartbeats of a host that owes answers, and between two checks by the frontend that waits for them
HEARTBEAT_S: Final = 0.1
#: a host that owes answers and sends nothing for so long counts as lost, unless the caller of `connect` says otherwise
SILENT_AFTER_S: Final = 1.0
#: a frontend whose kernel acknowledges nothing over TCP for so long is forgotten: its machine is gone, or the network is cut
FRONTEND_GONE_MS: Final = 10_000
#: for TCP to connect, which the host's kernel does at once, also while the host computes; a lost packet is sent again after 1 s
TCP_CONNECT_MS: Final = 2_000
#: a message says no more than this of the time that its host has: some thirty years, for deadlines that are none
LONGEST_S: Final = 1e9
#: between two attempts to connect to a unix socket whose queue of connections is full
DIAL_RETRY_S: Final = 0.005
#: until a host accepts frontends again, where its process has no file descriptor for them
ACCEPT_RETRY_S: Final = 0.5
#: for the last messages to leave a TCP socket that is closed: a frontend's, a host's
FRONTEND_LINGER_MS: Final = 100
HOST_LINGER_MS: Final = 200
