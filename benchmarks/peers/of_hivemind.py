"""hivemind's server with its feed-forward experts, and its two ways to ask them: `RemoteMixtureOfExperts`, and grouped by the caller."""

from __future__ import annotations

from importlib.metadata import version

import torch
from hivemind.compression import serialize_torch_tensor
from hivemind.dht import DHT
from hivemind.moe import RemoteMixtureOfExperts, get_experts
from hivemind.moe.client.expert import expert_forward
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.moe.server.layers import name_to_block
from hivemind.moe.server.server import background_server
from turns import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, grouped, take_turns

PREFIX = "expert."
#: processes that take requests; its default, 8 for each expert, is slower on few cores
HANDLERS = 4


def main() -> None:
    assert INTERMEDIATE == 4 * HIDDEN, "hivemind's feed-forward experts are that wide"
    torch.set_num_threads(2)
    uids = [f"{PREFIX}{number}" for number in range(EXPERTS)]
    serving = {"expert_cls": "ffn", "hidden_dim": HIDDEN, "num_handlers": HANDLERS, "device": "cpu", "optim_cls": None}
    with background_server(expert_uids=uids, **serving) as server:
        dht = DHT(initial_peers=server.dht_maddrs if hasattr(server, "dht_maddrs") else server.addrs, start=True, client_mode=True)
        experts = get_experts(dht, uids)
        assert all(experts), "the server has told of its experts"
        infos = [expert.info for expert in experts]
        gate = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        blocks = [name_to_block["ffn"](HIDDEN) for _ in uids]

        def ask(rows: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
            sent = [RemoteExpertWorker.run_coroutine(_ask(experts[one], infos[one], x), return_future=True) for one, x in rows.items()]
            return {one: answer.result() for one, answer in zip(rows, sent, strict=True)}

        mixture = RemoteMixtureOfExperts(in_features=HIDDEN, grid_size=(EXPERTS,), dht=dht, uid_prefix=PREFIX, k_best=TOP_K)
        sides = {
            "hivemind, grouped": grouped(ask, gate),
            "hivemind, RemoteMixtureOfExperts": mixture,
            "hivemind's experts, in process": grouped(lambda rows: {one: blocks[one](x) for one, x in rows.items()}, gate),
        }
        take_turns(sides, f"hivemind {version('hivemind')}, torch {version('torch')}")
        dht.shutdown()


async def _ask(expert, info, rows: torch.Tensor) -> torch.Tensor:
    tensors = [serialize_torch_tensor(rows, info["forward_schema"][0][0].compression)]
    return (await expert_forward(expert.uid, [rows], tensors, expert.stub))[0]


if __name__ == "__main__":
    main()
