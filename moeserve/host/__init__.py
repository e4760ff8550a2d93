"""An expert host without Ray: receive, pass on, merge, one grouped pass, answer."""

from moeserve.host.bank_table import BankTable
from moeserve.host.expert_key import ChangeBytes, ExpertKey, change_bytes, needed, needed_bytes
from moeserve.host.expert_store import ExpertStore
from moeserve.host.holdings import Holdings
from moeserve.host.host import Host, Where
from moeserve.host.loop import HostLoop
from moeserve.host.relay import Relay

__all__ = [
    "BankTable",
    "ChangeBytes",
    "ExpertKey",
    "ExpertStore",
    "Holdings",
    "Host",
    "HostLoop",
    "Relay",
    "Where",
    "change_bytes",
    "needed",
    "needed_bytes",
]
