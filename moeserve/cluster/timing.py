"""Every constant of time of this room, in seconds, and what it bounds; keeper.py, which imports nothing, has its own."""

from __future__ import annotations

from typing import Final

# How long until something is noticed: looks while it is waited for, and rounds of the one who watches.
#: a host that has moved, or one that is new, after the round before
WATCH_S: Final = 1.0
#: a host that is waited for has died, or is up: what Ray says of its actor
HOST_LOOK_S: Final = 0.5
#: a process or folder that the local Ray needs is missing
LOSS_LOOK_S: Final = 1.0
#: a process that was killed has let go of its files
END_LOOK_S: Final = 0.01
#: `moeserve leave`: no host has a place on the node any more
LEAVE_LOOK_S: Final = 0.5
#: an actor that was unavailable is back, or Ray has forgotten one that ended
RETRY_S: Final = 0.1
#: the same for a program; also, how late a line about its start is told
PROGRAM_RETRY_S: Final = 0.2

# How long something may take before it counts as failed.
#: Ray starts a host's process within seconds; on a machine that is very busy, in a minute
START_TIMEOUT_S: Final = 120.0
#: a host whose process lives says nothing: it hangs, and is killed; a healthy one never stays silent this long
HANG_S: Final = 60.0
#: hosts are told of each other; one that is late is told again when it is found
MEET_TIMEOUT_S: Final = 5.0
#: hosts hear in the end what to forget, and Ray forgets hosts that ended; a busy one is not waited for
FORGET_TIMEOUT_S: Final = 10.0
#: Ray grants a place that is free within milliseconds
GRANT_TIMEOUT_S: Final = 5.0
#: a host finishes its pass, then its process is killed, then that is seen: each
STOP_TIMEOUT_S: Final = 5.0
#: a program that ends itself through Ray exits without it
KILL_TIMEOUT_S: Final = 10.0
#: a node says what has become of a process
ASK_TIMEOUT_S: Final = 5.0
#: an address that is to be a Ray's is connected to
KNOCK_TIMEOUT_S: Final = 5.0

# A host that dies, or refuses what it shall load, rests between tries: doubled from one to the next.
LEAST_REST_S: Final = 5.0
MOST_REST_S: Final = 60.0
#: after so long its deaths before are forgotten
WELL_S: Final = 30.0
#: an actor has told whoever asked before its process ends
END_DELAY_S: Final = 0.1
