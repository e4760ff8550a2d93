"""Every constant of time of this room, in seconds, and what it bounds; keeper.py, which imports nothing, has its own."""

from __future__ import annotations

from typing import Final

# How soon something is noticed: intervals of polling and of watching.
#: a host that has moved, or one that is new, after the round before; one whose process on this machine ends is seen at once
WATCH_S: Final = 1.0
#: a host that is waited for has died, or is up: what Ray says of its actor, at first and after some seconds
QUICK_LOOK_S: Final = 0.05
HOST_LOOK_S: Final = 0.5
#: a process or folder that the local Ray needs is missing
LOSS_LOOK_S: Final = 1.0
#: a process that was killed has let go of its files
END_LOOK_S: Final = 0.01
#: `moeserve leave`: no host has a place on the node any more
LEAVE_LOOK_S: Final = 0.5
#: hosts of a node that start at about the same time have another spare process started together
SPARE_DELAY_S: Final = 0.1
#: a host that loads has read one more expert
LOADING_LOOK_S: Final = 0.5
#: an actor that was unavailable is back, or Ray has forgotten one that ended
RETRY_S: Final = 0.1
#: the same for a program; also, how late a line about its start is told
PROGRAM_RETRY_S: Final = 0.2

# How long something may take before it counts as failed.
#: Ray starts a host's process within seconds; on a machine that is very busy, in a minute
START_TIMEOUT_S: Final = 120.0
#: a host a host's process lives and does not answer: it hangs, and is killed; a healthy one always answers sooner
HANG_S: Final = 60.0
#: a host that has not answered for so long counts as down, though nobody has seen its process end
MISSED_S: Final = 4.0
#: hosts get the directory of all hosts; a late one gets it again when it is found
MEET_TIMEOUT_S: Final = 5.0
#: hosts are told at the end which releases to forget, and Ray forgets ended hosts; busy hosts are not waited for
FORGET_TIMEOUT_S: Final = 10.0
#: Ray grants a free reservation within milliseconds
GRANT_TIMEOUT_S: Final = 5.0
#: a host finishes its pass, then its process is killed, then that is seen: each
STOP_TIMEOUT_S: Final = 5.0
#: all of that, and what Ray says meanwhile of hosts: a Ray that does not answer is not waited for
END_TIMEOUT_S: Final = 20.0
#: a program that ends itself through Ray exits without it
KILL_TIMEOUT_S: Final = 10.0
#: Ray keeps the state of a controller within milliseconds, unless its GCS is away; the controller stands still meanwhile
SAVE_TIMEOUT_S: Final = 5.0
#: a node takes the order for a spare process
SPARE_TIMEOUT_S: Final = 5.0
#: a node reports why a process has ended
ASK_TIMEOUT_S: Final = 5.0
#: connecting to the address of a Ray
KNOCK_TIMEOUT_S: Final = 5.0
#: a cluster says there that it is one, also on a machine that is very busy
CLUSTER_TIMEOUT_S: Final = 30.0

# A host that dies, or cannot load its experts, waits between attempts, twice as long each time.
LEAST_REST_S: Final = 5.0
MOST_REST_S: Final = 60.0
#: after so long as it is ready, the rests before are forgotten
WELL_S: Final = 30.0
#: an actor has answered its caller before its process ends
END_DELAY_S: Final = 0.1
