"""Event loops and threads: waiting for something to change, things side by side, a loop in a thread, work in threads."""

from moeserve.loops.all_or_none import all_or_none
from moeserve.loops.daemon import in_thread, in_threads
from moeserve.loops.driven_loop import DrivenLoop, Waiter
from moeserve.loops.loop_thread import LoopThread
from moeserve.loops.notifier import Notifier

__all__ = ["DrivenLoop", "LoopThread", "Notifier", "Waiter", "all_or_none", "in_thread", "in_threads"]
