"""Event loops: waiting for something to change, and a loop in a thread of its own."""

from moeserve.loops.loop_thread import LoopThread
from moeserve.loops.notifier import Notifier

__all__ = ["LoopThread", "Notifier"]
