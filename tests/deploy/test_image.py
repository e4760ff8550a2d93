"""The image as compose.yaml runs it: nobody's user, nothing to write but /tmp, no capabilities. `.ci/image` builds one for this."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.containers import SERVICE, docker, filled, image

__all__ = ["image"]


#: an answer of the service against the layer in one process, both inside the container; their weights are bfloat16, and sums that were
#: added up in another order are not always rounded to it alike
FORWARD = """
import moeserve, torch
hidden_states = torch.randn(33, 128, generator=torch.Generator().manual_seed(0))
client = moeserve.Client("127.0.0.1:50051")
for layer in range(4):
    out = client.forward(hidden_states, layer=layer)
    expected = moeserve.MoELayer.from_checkpoint("/model", layer=layer).run(hidden_states)
    difference = (out.hidden_states - expected.hidden_states).norm(dim=1) / expected.hidden_states.norm(dim=1)
    assert difference.max() < 2 * torch.finfo(torch.bfloat16).eps
    assert int(out.processed.sum()) == 66
print("restarts", sum(host.restarts for host in client.stats().hosts))
"""


def flags(model: Path) -> list[str]:
    """compose.yaml's service for `docker run`, but for the network, of which it needs none here."""
    found = ["--network", "none", "--volume", f"{model}:/model:ro", "--shm-size", SERVICE["shm_size"]]
    found += [flag for flag, wanted in (("--read-only", SERVICE["read_only"]), ("--init", SERVICE["init"])) if wanted]
    for flag, values in (("--tmpfs", "tmpfs"), ("--cap-drop", "cap_drop"), ("--security-opt", "security_opt")):
        found += [word for value in SERVICE[values] for word in (flag, value)]
    return found


@pytest.fixture(scope="module")
def container(image: str, tiny_moe: Path) -> Iterator[str]:
    environment = [word for name, value in SERVICE["environment"].items() for word in ("--env", f"{name}={filled(value)}")]
    command = [filled(word) for word in SERVICE["command"]]
    name = docker("run", "--detach", *flags(tiny_moe), *environment, image, *command).strip()
    with subprocess.Popen(["docker", "logs", "--follow", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as logs:
        assert logs.stdout is not None
        said = []
        for line in logs.stdout:
            said.append(line)
            if line.startswith("ready "):
                break
        logs.kill()
    try:
        assert said[-1].startswith("ready "), "".join(said)
        yield name
    finally:
        docker("rm", "--force", name)


def test_it_answers_as_the_layer_in_one_process(container: str) -> None:
    assert "restarts 0" in docker("exec", "--interactive", container, "python", "-", given=FORWARD)


def test_it_is_nobody_and_writes_nothing_but_its_folder(container: str) -> None:
    assert docker("exec", container, "id", "-u").strip() == "10001"
    assert docker("exec", container, "grep", "CapEff", "/proc/self/status").split() == ["CapEff:", "0" * 16]
    for path in ("/x", "/opt/moeserve/x", "/var/tmp/x", "/home/x"):
        assert "Read-only file system" in docker("exec", container, "touch", path, code=1)
    docker("exec", container, "touch", "/tmp/x")


def test_the_probe_of_compose_finds_it_well(container: str) -> None:
    docker("exec", container, *SERVICE["healthcheck"]["test"][1:])


def test_a_killed_host_comes_back(container: str) -> None:
    pids = re.findall(r"host-\d ready .* pid (\d+)", docker("logs", container))
    assert len(pids) == 2
    docker("exec", container, "python", "-c", f"import os; os.kill({pids[0]}, 9)")
    assert "restarts 1" in docker("exec", "--interactive", container, "python", "-", given=FORWARD)


def test_it_drains_when_it_is_stopped(container: str) -> None:
    docker("stop", "--time", SERVICE["stop_grace_period"].removesuffix("s"), container)
    assert docker("logs", container).splitlines()[-1] == "stopped"
    assert docker("inspect", container, "--format", "{{.State.ExitCode}}").strip() == "0"


def test_it_does_not_serve_strangers_unasked(image: str, tiny_moe: Path) -> None:
    assert "can be reached from other machines" in docker("run", "--rm", *flags(tiny_moe), image, "serve", "/model", code=2)


def test_its_history_tells_nothing_of_where_it_was_built(image: str) -> None:
    assert "PIP_" not in docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
