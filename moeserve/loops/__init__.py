"""Event loops and threads: waiting for something to change, things side by side, at once or in turns, work and loops in threads."""

from moeserve.loops.all_or_none import all_or_none
from moeserve.loops.at_once import begin, to_its_end
from moeserve.loops.daemon import in_thread, in_threads
from moeserve.loops.driven_loop import DrivenLoop, Waiter
from moeserve.loops.loop_thread import LoopThread
from moeserve.loops.notifier import Notifier
from moeserve.loops.single_file import SingleFile

__all__ = ["DrivenLoop", "LoopThread", "Notifier", "SingleFile", "Waiter", "all_or_none", "begin", "in_thread", "in_threads", "to_its_end"]
