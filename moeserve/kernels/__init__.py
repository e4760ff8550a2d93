"""What runs below torch's operators: the compiled grouped pass, the memory its weights lie in, and a stopwatch to choose by."""

from moeserve.kernels.decode import Coded, can_decode, decode
from moeserve.kernels.memory import Arena, aligned, scratch
from moeserve.kernels.native import KERNELS, PANEL, Bank, Work, find_kernel, library
from moeserve.kernels.stopwatch import fastest_of

__all__ = [
    "KERNELS",
    "PANEL",
    "Arena",
    "Bank",
    "Coded",
    "Work",
    "aligned",
    "can_decode",
    "decode",
    "fastest_of",
    "find_kernel",
    "library",
    "scratch",
]
