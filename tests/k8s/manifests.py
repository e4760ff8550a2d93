"""What k8s/ comes to, overlay by overlay and with any choice of components, as `kubectl apply -k` sends it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from tests.k8s.kustomize import Manifest, build

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "k8s"
#: the oldest restarts init containers that keep running (restartPolicy: Always); the newest is the newest there is
KUBERNETES = ("1.29", "1.37")

OVERLAYS = ("base", "overlays/cpu-kind", "overlays/gpu", "overlays/ha")
_AUTOSCALING = ((), ("autoscaling",), ("autoscaling/experts",), ("autoscaling/hpa",), ("autoscaling/experts", "autoscaling/keda"))


@dataclass(frozen=True)
class Choice:
    """An overlay and the components beside it."""

    overlay: str
    components: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "+".join((self.overlay.removeprefix("overlays/"), *self.components))


def choices() -> list[Choice]:
    """Every combination; with a checkpoint, which is a folder more in each pod, only those that have everything else."""
    some = product(OVERLAYS, ((), ("tls",)), ((), ("monitoring",)), _AUTOSCALING)
    return list(
        dict.fromkeys([*(Choice(overlay, (*tls, *monitoring, *scaled)) for overlay, tls, monitoring, scaled in some), *everything()])
    )


def everything() -> list[Choice]:
    """An overlay each, with all components; the one for GPUs has a checkpoint of itself."""
    parts = ("checkpoint", "tls", "monitoring", "autoscaling")
    return [Choice(overlay, parts[overlay == "overlays/gpu" :]) for overlay in OVERLAYS]


def plain() -> list[Choice]:
    """An overlay each, as it is."""
    return [Choice(overlay) for overlay in OVERLAYS]


@cache
def render(choice: Choice) -> tuple[Manifest, ...]:
    return tuple(build(K8S / choice.overlay, tuple(K8S / "components" / name for name in choice.components)))


def kinds(choice: Choice, kind: str) -> list[Manifest]:
    return [manifest for manifest in render(choice) if manifest["kind"] == kind]


def one(choice: Choice, kind: str, name: str | None = None) -> Manifest:
    (found,) = (manifest for manifest in kinds(choice, kind) if name in (None, manifest["metadata"]["name"]))
    return found


@dataclass(frozen=True)
class Pods:
    """Pods that are made from one template, with the labels they will have."""

    name: str
    labels: dict[str, str]
    spec: Manifest
    replicas: int

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    def container(self, name: str) -> Manifest:
        (found,) = (container for container in self.containers if container["name"] == name)
        return found

    def is_selected(self, labels: dict[str, str]) -> bool:
        return labels.items() <= self.labels.items()


def pods(choice: Choice) -> list[Pods]:
    """Of every workload; those of a RayCluster as KubeRay makes them."""
    found = []
    for manifest in (*kinds(choice, "Deployment"), *kinds(choice, "StatefulSet")):
        template = manifest["spec"]["template"]
        # As Kubernetes has it, no number is 1; an autoscaler of pods decides it otherwise.
        found.append(
            Pods(manifest["metadata"]["name"], template["metadata"]["labels"], template["spec"], manifest["spec"].get("replicas", 1))
        )
    cluster = one(choice, "RayCluster")
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    found.append(_ray(name, "head", "headgroup", spec["headGroupSpec"]["template"], 1))
    for group in spec["workerGroupSpecs"]:
        found.append(_ray(name, "worker", group["groupName"], group["template"], group["replicas"]))
    return found


def _ray(cluster: str, kind: str, group: str, template: Manifest, replicas: int) -> Pods:
    labels = {
        "app.kubernetes.io/name": "kuberay",
        **template["metadata"]["labels"],
        "ray.io/cluster": cluster,
        "ray.io/node-type": kind,
        "ray.io/group": group,
    }
    return Pods(f"{cluster}-{group}", labels, template["spec"], replicas)


def pods_named(choice: Choice, name: str) -> Pods:
    (found,) = (each for each in pods(choice) if each.name == name)
    return found


def container(choice: Choice, name: str) -> Manifest:
    (found,) = (container for each in pods(choice) for container in each.containers if container["name"] == name)
    return found


def environment(choice: Choice, name: str) -> dict[str, str]:
    """Variables of a container that are written down, ConfigMaps included; not those that come from Secrets."""
    given: dict[str, str] = {}
    wanted = container(choice, name)
    for source in wanted.get("envFrom", []):
        given |= one(choice, "ConfigMap", source["configMapRef"]["name"])["data"]
    return given | {variable["name"]: variable["value"] for variable in wanted.get("env", []) if "value" in variable}


def strings(value: Any) -> Iterator[str]:
    """Every string of a manifest, keys left out."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from strings(each)
    elif isinstance(value, str):
        yield value


#: names of secrets, and the keys that they hold
#: made by people (docs/kubernetes.md), and by KubeRay
SECRETS = {
    "moeserve-tokens": {"token", "frontend-token", "admin-token"},
    "moeserve-tls": {"tls.crt", "tls.key", "ca.crt"},
    "moeserve-redis": {"password"},
    "moeserve": {"auth_token"},
}
