"""transformers' block in this process, as a deployment of Ray Serve (by its handle and by its gRPC proxy), and an actor for each expert."""

from __future__ import annotations

import socket
from importlib.metadata import version

import grpc
import ray
import torch
from google.protobuf.wrappers_pb2 import BytesValue
from ray import serve
from ray.serve.config import gRPCOptions
from transformers import MixtralConfig, MixtralForCausalLM
from turns import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, grouped, take_turns

METHOD = "Forward"
SERVICE = "peers.Block"
_MIB = 2**20


def block() -> torch.nn.Module:
    """A Mixtral block with the fastest of transformers' own ways to run it on CPUs."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    config = MixtralConfig(**sizes, num_hidden_layers=1, vocab_size=32, num_attention_heads=8, num_key_value_heads=8)
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval().model.layers[0].mlp


def run(module: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    answer = module(hidden_states[None])
    return (answer[0] if isinstance(answer, tuple) else answer).view_as(hidden_states)


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 1}, max_ongoing_requests=8)
class Block:
    """The whole block in one replica."""

    def __init__(self) -> None:
        torch.set_num_threads(2)
        self._block = block()

    def by_handle(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return run(self._block, hidden_states)

    def Forward(self, message: BytesValue) -> BytesValue:  # noqa: N802 - a method of gRPC
        hidden_states = torch.frombuffer(bytearray(message.value), dtype=torch.float32).view(-1, HIDDEN)
        return BytesValue(value=self.by_handle(hidden_states).numpy().tobytes())


@ray.remote(num_cpus=0)
class Expert:
    """One feed-forward expert."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._gate_up, self._down = torch.nn.Linear(HIDDEN, 2 * INTERMEDIATE, bias=False), torch.nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            gate, up = self._gate_up(rows).chunk(2, -1)
            return self._down(torch.nn.functional.silu(gate) * up)


def add_to_server(servicer, server) -> None:
    handler = grpc.unary_unary_rpc_method_handler(servicer.Forward, BytesValue.FromString, BytesValue.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def main() -> None:
    torch.set_num_threads(2)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        port = free_port()
        serve.start(
            http_options={"host": "127.0.0.1", "port": free_port()},
            grpc_options=gRPCOptions(port=port, grpc_servicer_functions=["of_ray.add_to_server"]),
        )
        handle = serve.run(Block.bind(), name="block")
        options = [("grpc.max_receive_message_length", 64 * _MIB), ("grpc.max_send_message_length", 64 * _MIB)]
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)
        call = channel.unary_unary(f"/{SERVICE}/{METHOD}", BytesValue.SerializeToString, BytesValue.FromString)
        metadata = (("application", "block"),)
        actors = [Expert.remote() for _ in range(EXPERTS)]
        gate = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        local = block()

        def proxied(hidden_states: torch.Tensor) -> torch.Tensor:
            answer = call(BytesValue(value=hidden_states.numpy().tobytes()), metadata=metadata, timeout=120)
            return torch.frombuffer(bytearray(answer.value), dtype=torch.float32).view_as(hidden_states)

        def ask(rows: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
            return dict(zip(rows, ray.get([actors[one].forward.remote(x) for one, x in rows.items()]), strict=True))

        sides = {
            "transformers' block, in process": lambda rows: run(local, rows),
            "Ray Serve, handle": lambda rows: handle.by_handle.remote(rows).result(),
            "Ray Serve, gRPC proxy": proxied,
            "Ray actors, one per expert": grouped(ask, gate),
        }
        take_turns(sides, f"ray {version('ray')}, transformers {version('transformers')}, torch {version('torch')}")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
