"""Which experts a token goes to is written down for every token id; what they weigh is learned: DeepSeek-V4's first layers.

T tokens, V ids in the table, E experts, K choices per token. After Roller et al. 2021, "Hash Layers for Large Sparse Models"
(arXiv 2106.04426), whose table is random too. The weights are the scores of the chosen experts.
"""

from __future__ import annotations

from torch import Tensor

from moeserve.errors import ConfigError, InvalidRequest
from moeserve.gating.gate_input import GateInput, Selection
from moeserve.gating.scoring import SCORING


def by_token_table(gate: GateInput) -> Selection:
    if gate.token_experts is None:
        raise ConfigError("gating.routing = 'token_table' needs token_experts, the experts of each token id")
    if gate.token_ids is None:
        raise InvalidRequest("token_ids is required: this layer routes by a table of token ids", "token_ids")
    topk_ids = gate.token_experts[_known(gate.token_ids, len(gate.token_experts), gate.requests.used_token)]
    scores = SCORING[gate.gating.scoring_func](gate.router_logits, gate.elementwise)
    if gate.gating.scoring_func == "softmax_topk":
        return Selection(scores, topk_ids, gate.router_logits.gather(1, topk_ids).softmax(dim=1))
    return Selection(scores, topk_ids, scores.gather(1, topk_ids))


def _known(token_ids: Tensor, count: int, used_token: Tensor | None) -> Tensor:
    """The ids, 0 for tokens that do not count. Raises InvalidRequest for one beyond the table."""
    ids = token_ids if used_token is None else token_ids.where(used_token, 0)
    bad = (ids < 0) | (ids >= count)
    if bad.any():
        raise InvalidRequest(f"token_ids has {int(ids[bad][0])}; this layer knows 0..{count - 1}", "token_ids")
    return ids
