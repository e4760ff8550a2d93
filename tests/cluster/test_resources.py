"""What a cluster cannot give is said at once, in a sentence."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from moeserve import BackgroundService, CheckpointError, Client, ConfigError, ExpertUnavailable, serve
from moeserve.cluster.ray_internals import session_dir
from moeserve.cluster.ray_loss import Loss, find_loss
from tests.support.ray_service import pid_of
from tests.support.waiting import until

pytestmark = pytest.mark.ray

LAYER = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 16}
SERVER = {"port": 0, "metrics_port": 0}


def test_more_gpus_than_are_free(service: BackgroundService) -> None:
    config = {"layers": [LAYER], "placement": {"num_hosts": 9, "gpus_per_host": 1, "cpus_per_host": 0}, "server": SERVER}
    sentence = r"num_hosts is 9 .* but there is room for 4: .* has room for 4 \(4 of 8 .*Missing: 5 GPUs$"
    with pytest.raises(ConfigError, match=sentence):
        serve(config)


def test_all_is_what_the_nodes_have_room_for(service: BackgroundService) -> None:
    placement = {"num_hosts": "all", "gpus_per_host": 2, "cpus_per_host": 0}
    with serve({"layers": [LAYER], "placement": placement, "server": SERVER}) as other, Client(other.target) as client:
        assert [len(host.cuda_visible_devices.split(",")) for host in client.stats().hosts] == [2, 2]


def test_without_its_folder_ray_is_lost(service: BackgroundService) -> None:
    """On the loop of the service that runs there, which looks for it from time to time and would not go on."""
    session = session_dir()
    assert session is not None

    def found_without() -> Loss | None:
        away = session.rename(session.with_name("away"))
        try:
            return find_loss()
        finally:
            away.rename(session)

    async def on_loop() -> Loss | None:
        return found_without()

    assert find_loss() is None
    assert service._thread.call(on_loop()) == Loss(f"the folder of Ray, {session}, has been removed", is_final=False)
    assert find_loss() is None


class Dying(nn.Linear):
    """An expert that takes its host with it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, hidden_size)
        if b"ExpertHost" in Path("/proc/self/cmdline").read_bytes():
            print("no luck today", file=sys.stderr, flush=True)
            os._exit(1)


def test_a_host_that_dies_again_and_again_is_not_waited_for(local_ray: None) -> None:
    """What is known of it is said: what it was to hold, what Ray says, what it said last."""
    layer = {"hidden_size": 16, "num_experts": 2, "expert": "tests.cluster.test_resources:Dying", "expert_args": {"hidden_size": 16}}
    sentence = (
        r"^host-0 died [34] times while it loaded its experts\. It was to hold 0\.0 MiB of weights\. "
        r"Ray says: .*Its log ends: .*no luck today\.$"
    )
    with pytest.raises(ExpertUnavailable, match=sentence):
        serve({"layers": [layer], "placement": {"num_hosts": 1}, "server": SERVER})


class Moody(nn.Linear):
    """An expert that takes its host with it while the file is there; each of its lines is one that did, the line "once" takes it away.

    While the line is "hang", it waits for a pipe that nobody writes to, as for a file system that does not answer.
    """

    def __init__(self, hidden_size: int, mood: str) -> None:
        super().__init__(hidden_size, hidden_size)
        if not os.path.exists(mood) or b"ExpertHost" not in Path("/proc/self/cmdline").read_bytes():
            return
        said = Path(mood).read_text()
        if "hang" in said:
            Path(mood).with_suffix(".pipe").read_text()
            return
        if "once" in said:
            os.unlink(mood)
        with open(mood + ".deaths" if "once" in said else mood, "a") as deaths:
            print(os.getpid(), file=deaths)
        os._exit(1)


def test_a_host_that_cannot_come_back_rests_between_tries_and_heals_and_one_that_hangs_is_in_nobodys_way(
    local_ray: None, tmp_path: Path
) -> None:
    mood = tmp_path / "mood"
    expert = {"expert": "tests.cluster.test_resources:Moody", "expert_args": {"hidden_size": 16, "mood": str(mood)}}
    layer = {"hidden_size": 16, "num_experts": 4, "gating": {"top_k": 1}, **expert}
    placement = {"num_hosts": 2, "cpus_per_host": 0.5, "load_timeout_s": 3.0}

    def ask(client: Client, expert: int) -> int:
        ids, weights = torch.full((2, 1), expert), torch.ones(2, 1)
        return client.forward(torch.randn(2, 16), topk_ids=ids, topk_weights=weights, timeout=120.0).processed[expert].item()

    with serve({"layers": [layer], "placement": placement, "server": SERVER}) as service, Client(service.target) as client:
        assert [ask(client, expert) for expert in range(4)] == [2] * 4
        pid = pid_of(service, "host-1")
        for _ in range(3):  # it dies while it loads, but each time it comes up then
            mood.write_text("once\n")
            os.kill(pid, signal.SIGKILL)
            assert ask(client, 3) == 2
            pid = until(lambda pid=pid: (found := pid_of(service, "host-1")) != pid and found)
        mood.touch()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ExpertUnavailable, match=r"experts? \d+ of layer layers\.0 on host-1 are not available: host-1 died [34] times"):
            ask(client, 3)
        assert ask(client, 0) == 2 and not client.ready()
        assert len(mood.read_text().splitlines()) <= 5, "it rests, and Ray with it"
        mood.unlink()
        until(client.ready)
        assert ask(client, 3) == 2

        os.mkfifo(mood.with_suffix(".pipe"))
        mood.write_text("hang\n")
        with pytest.raises(ConfigError, match=r"^host-0 could not read one more expert within 3 s \(placement\.load_timeout_s\)"):
            service.drain_host("host-1")
        assert [ask(client, expert) for expert in range(4)] == [2] * 4
        mood.unlink()
        service.drain_host("host-1")
        assert [ask(client, expert) for expert in range(4)] == [2] * 4
        mood.write_text("hang\n")
        with ThreadPoolExecutor() as pool:
            hanging = pool.submit(service.scale, 2)
            until(lambda: service._service.controller.status().is_changing)
            service.stop()
            with pytest.raises(ExpertUnavailable, match="the service is ending: the change was withdrawn"):
                hanging.result(timeout=60)


def test_a_host_that_cannot_read_its_weights_ends_the_start(local_ray: None, tiny_moe: Path, tmp_path: Path) -> None:
    """The header is whole, so the frontend starts; a tensor of an expert is not what config.json says, so its host refuses."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_moe, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in sorted(tensors) if "experts" in name)
    tensors[name] = tensors[name] * float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        serve({"model": {"checkpoint": broken}, "placement": {"num_hosts": 2, "cpus_per_host": 0}, "server": SERVER})
