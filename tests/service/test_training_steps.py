"""What a trainer does beside a service: it replays what was chosen, and swaps in the experts of step after step."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeserve import Client, ForwardOutput, MoELayer
from tests.support.checkpoints_on_disk import MLP
from tests.support.closeness import assert_close
from tests.support.harness import CHANNELS, Kind, ServiceHarness
from tests.support.seeded_folders import LAYER, configuration, folder, tokens

SWAPPED = [0, 2]
STEPS = 50


def written(path: Path, base: Path, seed: int) -> Path:
    """A folder of a step: new tensors of two experts, and a link to the file with all others."""
    path.mkdir()
    for name in ("config.json", "model.safetensors"):
        (path / name).symlink_to(base / name)
    old, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(seed)
    names = [name for name in old for expert in SWAPPED if f"{MLP}.experts.{expert}." in name]
    save_file({name: torch.randn(old[name].shape, generator=generator) for name in names}, path / "step.safetensors")
    files = dict.fromkeys(old, "model.safetensors") | dict.fromkeys(names, "step.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return path


@pytest.mark.slow
def test_fifty_steps_under_load_fail_no_call_and_no_answer_is_a_mix(tmp_path: Path) -> None:
    base, rows = folder(tmp_path / "base", 0), tokens(0)
    expected = [MoELayer.from_checkpoint(base, dtype=torch.float32)(rows)]
    stop, answered = threading.Event(), threading.Semaphore(0)

    def caller(client: Client) -> list[ForwardOutput]:
        answers = []
        while not stop.is_set():
            answers.append(client.forward(rows))
            answered.release()
        return answers

    with ServiceHarness(configuration(base), "shm", tmp_path) as service, Client(service.target) as client, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(caller, client) for _ in range(2)]
        try:
            for step in range(1, STEPS + 1):
                path = written(tmp_path / f"step-{step}", base, step)
                expected.append(MoELayer.from_checkpoint(path, dtype=torch.float32)(rows))
                service.call(service.controller.swap(LAYER, path, SWAPPED))
                shutil.rmtree(tmp_path / f"step-{step - 1}", ignore_errors=True)
                assert answered.acquire(timeout=30)
        finally:
            stop.set()
        answers = [answer for each in running for answer in each.result()]
        for answer in answers:
            assert_close(answer.hidden_states, expected[answer.model_revision - 1])
        for host in service.hosts:
            host.stop()
            host.start()
        assert_close(client.forward(rows).hidden_states, expected[STEPS])


@pytest.mark.parametrize("kind", CHANNELS)
def test_a_rollout_with_drops_is_replayed_bit_by_bit(kind: Kind, tmp_path: Path) -> None:
    gating = {"top_k": 2, "capacity_factor": 1.0}
    config = {**configuration(folder(tmp_path / "base", 0)), "layers": [{"gating": gating}]}
    with ServiceHarness(config, kind, tmp_path) as service, Client(service.target) as client:
        rollout = client.forward(tokens(0), return_routing=True)
        assert rollout.topk_ids is not None and rollout.drop_reasons is not None and rollout.drops
        ids = rollout.topk_ids.masked_fill(rollout.drop_reasons != 0, -1)
        again = client.forward(tokens(0), topk_ids=ids, topk_weights=rollout.topk_weights, return_routing=True)
    assert again.topk_ids is not None and again.topk_weights is not None
    assert torch.equal(again.topk_ids, ids)
    assert torch.equal(again.topk_weights, rollout.topk_weights)
    assert torch.equal(again.hidden_states, rollout.hidden_states)
    assert torch.equal(again.processed, rollout.processed)
    assert again.drops == []
