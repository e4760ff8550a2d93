"""How long a frontend waits for hosts, in seconds, and how often it lets them err."""

from __future__ import annotations

from typing import Final

#: between two tries to connect to a host: the first pause, which doubles up to the longest
SHORTEST_RETRY_S: Final = 0.05
RETRY_S: Final = 0.5
#: so many errors of a host within the window take it out of rotation
BREAKER_ERRORS: Final = 3
BREAKER_WINDOW_S: Final = 10.0
#: between two canaries of a host that is out of rotation: the first pause, which doubles up to the longest
CANARY_S: Final = 0.5
LONGEST_CANARY_S: Final = 8.0
#: how often hosts that owe answers are looked at, whether they are stuck
STUCK_LOOK_S: Final = 1.0
#: a host that says it lives is given so many times resilience.hang_after_ms before it can be stuck
STUCK_HANGS: Final = 10.0
#: until a host that had nothing of the epoch is asked again
BEHIND_S: Final = 0.1
#: before the deadline of a caller, who hears in time what was waited for
LAST_WORD_S: Final = 0.05
