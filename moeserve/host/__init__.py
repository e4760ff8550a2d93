"""An expert host without Ray: receive, pass on, merge, one grouped pass, answer."""

from moeserve.host.bank_table import BankTable
from moeserve.host.expert_cache import ExpertCache, Loadable
from moeserve.host.expert_key import ExpertKey, bytes_of_both, needed, needed_bytes
from moeserve.host.expert_store import ExpertStore
from moeserve.host.holdings import Holdings
from moeserve.host.host import Host, Where, give_way
from moeserve.host.loop import HostLoop
from moeserve.host.relay import Relay
from moeserve.host.spilled_bank import SpilledBank

__all__ = [
    "BankTable",
    "ExpertCache",
    "ExpertKey",
    "ExpertStore",
    "Holdings",
    "Host",
    "HostLoop",
    "Loadable",
    "Relay",
    "SpilledBank",
    "Where",
    "bytes_of_both",
    "give_way",
    "needed",
    "needed_bytes",
]
