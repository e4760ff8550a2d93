"""An expert host without Ray: receive, pass on, merge, one grouped pass, answer."""

from moeserve.host.bank_table import BankTable
from moeserve.host.holdings import Holdings
from moeserve.host.host import Host, Where
from moeserve.host.loop import HostLoop
from moeserve.host.relay import Relay

__all__ = ["BankTable", "Holdings", "Host", "HostLoop", "Relay", "Where"]
