"""Works -> messages: what each host receives, and what it passes on.

T tokens, R rows of one message, N pairs of one message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from moeserve.layer.dispatch import HostWork
from moeserve.transport import Destination, PassOn


@dataclass(frozen=True)
class Message:
    """Works that are sent together to the host of the first one: its own pairs come first, then the pairs it passes on.

    rows      [R] int64, ascending: the tokens that are sent, each once
    row_index [N] int32: which of those rows a pair reads
    """

    works: Sequence[HostWork]
    pass_on: PassOn
    rows: torch.Tensor
    row_index: torch.Tensor

    @property
    def host(self) -> int:
        """The host that receives it."""
        return self.works[0].host

    @cached_property
    def local_experts(self) -> torch.Tensor:
        """[N] int32: ascending within each work."""
        return self.works[0].local_experts if len(self.works) == 1 else torch.cat([work.local_experts for work in self.works])

    @cached_property
    def weights(self) -> torch.Tensor:
        """[N] float32."""
        return self.works[0].weights if len(self.works) == 1 else torch.cat([work.weights for work in self.works])

    @property
    def destinations(self) -> list[Destination]:
        """Where each work's pairs end; nothing for a message to one host."""
        ends = np.cumsum([len(work.local_experts) for work in self.works]).tolist()
        return [Destination(work.host, end) for work, end in zip(self.works, ends, strict=True)] if len(self.works) > 1 else []


#: works in the order of their hosts, and the node of every host -> messages
Pattern = Callable[[Sequence[HostWork], Mapping[int, str]], list[Message]]


def all_to_all(works: Sequence[HostWork], nodes: Mapping[int, str]) -> list[Message]:
    """One message per busy host: an all-to-all exchange in which one side holds the tokens and the other the experts.

    Source: TrustformeRS `ExpertCommunicationPattern::AllToAll`; GShard (arXiv 2006.16668).
    """
    return [Message((work,), PassOn.NOTHING, work.rows, work.row_index) for work in works]


def point_to_point(works: Sequence[HostWork], nodes: Mapping[int, str]) -> list[Message]:
    """One message per busy expert: small messages that a host can start one by one.

    Source: TrustformeRS `ExpertCommunicationPattern::PointToPoint`.
    """
    return all_to_all([part for work in works for part in _by_expert(work)], nodes)


def hierarchical(works: Sequence[HostWork], nodes: Mapping[int, str]) -> list[Message]:
    """One message per node: a row crosses the network once; the first busy host there passes it to its neighbors and adds their sums.

    Source: hierarchical all-to-all of Tutel (arXiv 2206.03382) and DeepSpeed-MoE (arXiv 2201.05596), MindFormers `group_wise_a2a`,
    TrustformeRS `ExpertCommunicationPattern::Hierarchical`.
    """
    by_node: dict[str, list[HostWork]] = {}
    for work in works:
        by_node.setdefault(nodes[work.host], []).append(work)
    return [_joined(group, PassOn.FAN_OUT) for group in by_node.values()]


def ring(works: Sequence[HostWork], nodes: Mapping[int, str]) -> list[Message]:
    """One message: each busy host keeps its share, passes the rest to the next by number, and adds its sums to what comes back.

    Source: TrustformeRS `ExpertCommunicationPattern::Ring`; ring exchanges of MPI collectives.
    """
    return [_joined(works, PassOn.CHAIN)] if works else []


DIRECT = "all_to_all"
PATTERNS: dict[str, Pattern] = {"all_to_all": all_to_all, "point_to_point": point_to_point, "hierarchical": hierarchical, "ring": ring}


def _by_expert(work: HostWork) -> list[HostWork]:
    """The pairs of each local expert as a work of its own; they read the rows in order, because an expert sees a token once."""
    local_experts = work.local_experts.numpy()
    starts = np.flatnonzero(np.diff(local_experts, prepend=-1)).tolist()
    parts = []
    for start, end in zip(starts, [*starts[1:], len(local_experts)], strict=True):
        rows = work.rows[work.row_index[start:end]]
        parts.append(
            HostWork(work.host, rows, torch.arange(end - start, dtype=torch.int32), work.local_experts[start:end], work.weights[start:end])
        )
    return parts


def _joined(works: Sequence[HostWork], pass_on: PassOn) -> Message:
    """All works in one message to the first one's host."""
    if len(works) == 1:
        return Message(tuple(works), PassOn.NOTHING, works[0].rows, works[0].row_index)
    is_sent = np.zeros(1 + max(int(work.rows[-1]) for work in works), dtype=np.bool_)
    for work in works:
        is_sent[work.rows.numpy()] = True
    position = is_sent.cumsum(dtype=np.int32) - 1
    row_index = np.concatenate([position[work.rows.numpy()[work.row_index.numpy()]] for work in works])
    return Message(tuple(works), pass_on, torch.from_numpy(np.flatnonzero(is_sent)), torch.from_numpy(row_index))
