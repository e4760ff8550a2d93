"""Every pod is what the Pod Security Standard calls restricted, and then some."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.deploy.dockerfile import given
from tests.k8s.manifests import K8S, Choice, Manifest, everything, kinds, one, plain, pods

ALL = [*plain(), *everything()]
CONTAINER = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
#: kinds of volumes that the standard allows
ALLOWED = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected", "secret"}


def check(spec: Manifest) -> None:
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True and context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] > 0
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    for found in (*spec.get("initContainers", []), *spec["containers"]):
        assert found["securityContext"] == CONTAINER, found["name"]
        resources = found["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"] and "cpu" in resources["requests"], found["name"]
        for name, number in resources["limits"].items():
            if "/" in name:
                assert resources["requests"][name] == number
        assert not any("hostPort" in port for port in found.get("ports", []))
    for volume in spec.get("volumes", []):
        assert len(volume.keys() & ALLOWED) == 1 and volume.keys() <= {"name", *ALLOWED}


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_pods_are_restricted(choice: Choice) -> None:
    for each in pods(choice):
        check(each.spec)
    namespace = one(choice, "Namespace")["metadata"]["labels"]
    assert namespace["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_loader_is_restricted() -> None:
    check(yaml.safe_load((K8S / "components" / "checkpoint" / "loader.yaml").read_text())["spec"])


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_containers_of_the_image_run_as_its_user_and_may_write_where_it_must(choice: Choice) -> None:
    (user,) = given("USER")
    for each in pods(choice):
        if any(found["image"].startswith("moeserve:") for found in each.containers):
            context = each.spec["securityContext"]
            assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
            for found in each.containers:
                assert "/tmp" in [mount["mountPath"] for mount in found["volumeMounts"]]


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_ray_has_memory_for_dev_shm(choice: Choice) -> None:
    for each in pods(choice):
        if "ray.io/cluster" in each.labels:
            (volume,) = (volume for volume in each.spec["volumes"] if volume["name"] == "shared-mem")
            assert volume["emptyDir"]["medium"] == "Memory" and volume["emptyDir"]["sizeLimit"]
            assert all("/dev/shm" in [mount["mountPath"] for mount in found["volumeMounts"]] for found in each.containers)


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_the_deployer_can_be_a_driver_of_ray(choice: Choice) -> None:
    """It needs to see the raylet's process, its sockets and its object store, and the volume that KubeRay's autoscaler shares by name."""
    (head,) = (each for each in pods(choice) if each.labels.get("ray.io/node-type") == "head")
    deployer, ray = head.container("deployer"), head.container("ray-head")
    assert head.spec["shareProcessNamespace"] is True and deployer["restartPolicy"] == "Always"
    for path in ("/tmp", "/tmp/ray", "/dev/shm"):
        (ours,), (rays,) = ([mount for mount in found["volumeMounts"] if mount["mountPath"] == path] for found in (deployer, ray))
        assert ours == rays
    assert {"name": "ray-logs", "mountPath": "/tmp/ray"} in ray["volumeMounts"]
    assert head.spec["containers"][0] == ray  # KubeRay takes the first one for Ray's
    cluster = one(choice, "RayCluster")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    token = next(variable for variable in deployer["env"] if variable["name"] == "RAY_AUTH_TOKEN")
    assert token["valueFrom"]["secretKeyRef"] == {"name": cluster["metadata"]["name"], "key": "auth_token"}


@pytest.mark.parametrize("choice", [choice for choice in ALL if "autoscaling" in choice.components], ids=str)
def test_only_the_autoscaler_has_a_token_of_kubernetes(choice: Choice) -> None:
    options = one(choice, "RayCluster")["spec"]["autoscalerOptions"]
    assert options["securityContext"] == CONTAINER
    tokens = {volume["name"] for each in pods(choice) for volume in each.spec.get("volumes", []) if "projected" in volume}
    (mount,) = (mount for mount in options["volumeMounts"] if mount["name"] in tokens)
    assert mount["mountPath"] == "/var/run/secrets/kubernetes.io/serviceaccount" and mount["readOnly"]
    assert not [mount for each in pods(choice) for found in each.containers for mount in found["volumeMounts"] if mount["name"] in tokens]


def test_the_admin_token_is_with_the_controller_alone() -> None:
    for each in pods(Choice("base")):
        for volume in each.spec["volumes"]:
            if volume.get("secret", {}).get("secretName") == "moeserve-tokens":
                keys: Any = {item["key"] for item in volume["secret"].get("items", [{"key": "admin-token"}])}
                assert ("admin-token" in keys) == (each.labels.get("ray.io/node-type") == "head")
    assert not kinds(Choice("base"), "Secret")
