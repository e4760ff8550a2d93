"""How long deployed programs wait for each other, in seconds."""

from __future__ import annotations

from typing import Final

#: between two looks at frontends that a controller has started; also beyond server.drain_timeout_s, for them to end
FRONTENDS_LOOK_S: Final = 5.0
#: between two looks whether a service is still deployed
GONE_LOOK_S: Final = 2.0
#: for a controller that could not start to undo what it began
STOP_TIMEOUT_S: Final = 30.0
#: for calls of administrators and followers to end, when a controller stops
CONTROLLER_DRAIN_S: Final = 5.0
#: before a frontend process that has ended is started again: the first pause, which doubles up to the longest
PROCESS_RESTART_S: Final = 0.2
PROCESS_SLOWEST_RESTART_S: Final = 10.0
#: beyond server.drain_timeout_s, for a frontend process to end
PROCESS_END_S: Final = 5.0
#: a program's own frontend: for its controller to be reached, before that is an error, and for hosts to be, before its first call
AWAY_S: Final = 5.0
HOSTS_S: Final = 5.0
