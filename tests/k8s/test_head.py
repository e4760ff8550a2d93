"""The head pod in containers, as KubeRay and Kubernetes run it: Ray in one, beside it a driver in another, where the deployer is.

Security context, mounts, variables and Ray's parameters are those of the manifest. `.ci/image` builds the image for this.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import pytest

from tests.deploy.containers import docker, image
from tests.k8s.manifests import Choice, Manifest, container, one, pods_named

__all__ = ["image"]

HEAD = Choice("base")
#: what Kubernetes asks of Ray's container: KubeRay 1.7 with Ray 2.53 or newer
PROBE = "import urllib.request as u; assert u.urlopen('http://127.0.0.1:52365/api/healthz', timeout=2).status == 200"
DRIVER = """
import os, ray
ray.init(address="127.0.0.1:6379", namespace="moeserve", log_to_driver=False)

@ray.remote(num_cpus=0, max_restarts=-1)
class Controller:
    def process(self):
        return os.getpid()

controller = Controller.options(name="controller", lifetime="detached", get_if_exists=True).remote()
print("controller", ray.get(controller.process.remote()), len(ray.get(ray.put(b"x" * 10_000_000))))
"""


def flags(found: Manifest, names: dict[str, str], token: str) -> list[str]:
    """A container of the head pod for `docker run`; its volumes are those of `names`, without those that hold files."""
    context, inner = pods_named(HEAD, "moeserve-headgroup").spec["securityContext"], found["securityContext"]
    said = ["--user", f"{context['runAsUser']}:{context['runAsGroup']}", "--security-opt", "no-new-privileges"]
    said += ["--read-only"] * inner["readOnlyRootFilesystem"]
    said += [word for name in inner["capabilities"]["drop"] for word in ("--cap-drop", name)]
    for mount in found["volumeMounts"]:
        if mount["name"] in names:
            said += ["--volume", f"{names[mount['name']]}:{mount['mountPath']}:nocopy"]
    given = {variable["name"]: variable.get("value", token) for variable in found.get("env", [])}
    given |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}  # KubeRay's part
    return [*said, *(word for name, value in given.items() for word in ("--env", f"{name}={value}"))]


@pytest.fixture(scope="module")
def head(image: str) -> Iterator[list[str]]:
    """Flags of a container beside Ray's, once Ray is well."""
    spec = pods_named(HEAD, "moeserve-headgroup").spec
    token, mark = secrets.token_hex(32), secrets.token_hex(4)
    names = {volume["name"]: f"{volume['name']}-{mark}" for volume in spec["volumes"] if "emptyDir" in volume}
    for name in names.values():
        docker("volume", "create", "--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", "o=mode=1777", name)
    pause = docker("run", "--detach", "--network", "none", "--entrypoint", "sleep", image, "infinity").strip()
    pod = ["--network", f"container:{pause}", *(["--pid", f"container:{pause}"] if spec["shareProcessNamespace"] else [])]
    parameters = one(HEAD, "RayCluster")["spec"]["headGroupSpec"]["rayStartParams"]
    start = " ".join(["ulimit -n 65536; ray start --head --block", *(f"--{name}={value}" for name, value in parameters.items())])
    ray = docker(
        "run", "--detach", *pod, *flags(container(HEAD, "ray-head"), names, token), "--entrypoint", "bash", image, "-c", "--", start
    )
    try:
        end = time.monotonic() + 60
        while "rror" in docker("exec", ray.strip(), "sh", "-c", f'python -c "{PROBE}" 2>&1 || true'):
            assert time.monotonic() < end, docker("logs", ray.strip())
        yield [*pod, *flags(container(HEAD, "deployer"), names, token)]
    finally:
        docker("rm", "--force", ray.strip(), pause)
        docker("volume", "rm", *names.values())


def test_a_container_beside_ray_is_a_driver_and_what_it_starts_outlives_it(image: str, head: list[str]) -> None:
    processes = set()
    for _ in range(2):
        said = docker("run", "--rm", "--interactive", *head, "--entrypoint", "python", image, "-", given=DRIVER).splitlines()
        (line,) = (line for line in said if line.startswith("controller"))
        assert line.endswith(" 10000000")
        processes.add(line.split()[1])
    assert len(processes) == 1


def test_without_the_token_it_is_not(image: str, head: list[str]) -> None:
    stranger = [word if not word.startswith("RAY_AUTH_TOKEN=") else f"RAY_AUTH_TOKEN={'0' * 64}" for word in head]
    said = docker("run", "--rm", "--interactive", *stranger, "--entrypoint", "python", image, "-", given=DRIVER, code=1)
    assert "uthenticat" in said


def test_the_program_of_kuberay_that_waits_for_the_head_fits_into_its_memory(image: str, head: list[str]) -> None:
    """KubeRay gives wait-gcs-ready 256 MiB, whatever the image."""
    docker("run", "--rm", *head, "--memory", "256m", "--entrypoint", "ray", image, "health-check", "--address", "127.0.0.1:6379")
