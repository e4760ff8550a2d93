"""How published checkpoints store numbers: as they are, or in few bits with scales. One file for each format, one table of them all."""

from moeserve.checkpoints.formats.coded import Coded
from moeserve.checkpoints.formats.methods import METHODS, scheme_of
from moeserve.checkpoints.formats.number_format import FLOATS, CodedFormat, Kind, NumberFormat, Piece, Plain, Read
from moeserve.checkpoints.formats.scheme import AS_IS, Scheme, telltales

__all__ = [
    "AS_IS",
    "FLOATS",
    "METHODS",
    "Coded",
    "CodedFormat",
    "Kind",
    "NumberFormat",
    "Piece",
    "Plain",
    "Read",
    "Scheme",
    "scheme_of",
    "telltales",
]
