"""Whatever names something names something that is there."""

from __future__ import annotations

from typing import Any

import pytest

from moeserve.config import ServerConfig
from moeserve.config.service import ControllerConfig
from tests.k8s.manifests import (
    SECRETS,
    Choice,
    Manifest,
    Pods,
    choices,
    container,
    environment,
    everything,
    kinds,
    one,
    plain,
    pods,
    pods_named,
)

ALL = [*plain(), *everything()]
#: where the program is told of files
FILES = ("_FILE", "_CERT", "_KEY", "_CA")


def selected(choice: Choice, labels: dict[str, str]) -> list[Pods]:
    return [each for each in pods(choice) if each.is_selected(labels)]


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_workloads_select_their_own_pods(choice: Choice) -> None:
    for manifest in (*kinds(choice, "Deployment"), *kinds(choice, "StatefulSet")):
        found = selected(choice, manifest["spec"]["selector"]["matchLabels"])
        assert [each.name for each in found] == [manifest["metadata"]["name"]]
    for each in pods(choice):
        assert each.labels["app.kubernetes.io/part-of"] == "moeserve"
        for constraint in each.spec.get("topologySpreadConstraints", []):
            assert selected(choice, constraint["labelSelector"]["matchLabels"]) == [each]


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_services_and_budgets_select_one_kind_of_pod(choice: Choice) -> None:
    for manifest in kinds(choice, "Service"):
        (found,) = selected(choice, manifest["spec"]["selector"])
        named = {port["name"] for each in found.containers for port in each.get("ports", [])}
        for port in manifest["spec"]["ports"]:
            assert port["targetPort"] in named
            (target,) = (each for one_of in found.containers for each in one_of.get("ports", []) if each["name"] == port["targetPort"])
            assert target["containerPort"] == port["port"]
    for manifest in kinds(choice, "PodDisruptionBudget"):
        assert len(selected(choice, manifest["spec"]["selector"]["matchLabels"])) == 1


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_what_is_mounted_is_there(choice: Choice) -> None:
    for each in pods(choice):
        volumes = {volume["name"]: volume for volume in each.spec.get("volumes", [])}
        claimed = {claim["metadata"]["name"] for claim in claims(choice, each)}
        mounted = {mount["name"] for found in each.containers for mount in found["volumeMounts"]} | autoscaler_mounts(choice, each)
        assert mounted == volumes.keys() | claimed
        for volume in volumes.values():
            if "configMap" in volume:
                assert "service.toml" in one(choice, "ConfigMap", volume["configMap"]["name"])["data"]
            if "secret" in volume:
                keys = {item["key"] for item in volume["secret"].get("items", [])}
                assert keys <= SECRETS[volume["secret"]["secretName"]] and volume["secret"]["defaultMode"] == 0o440
            if "persistentVolumeClaim" in volume:
                assert one(choice, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
                assert volume["persistentVolumeClaim"]["readOnly"]


def claims(choice: Choice, each: Pods) -> list[Manifest]:
    found = [manifest for manifest in kinds(choice, "StatefulSet") if manifest["metadata"]["name"] == each.name]
    return found[0]["spec"]["volumeClaimTemplates"] if found else []


def autoscaler_mounts(choice: Choice, each: Pods) -> set[str]:
    options = one(choice, "RayCluster")["spec"].get("autoscalerOptions", {})
    return {mount["name"] for mount in options.get("volumeMounts", [])} if each.name == "moeserve-headgroup" else set()


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_secrets_are_only_referred_to_and_by_keys_that_they_have(choice: Choice) -> None:
    assert not kinds(choice, "Secret")
    found = [
        variable["valueFrom"]
        for each in pods(choice)
        for one_of in each.containers
        for variable in one_of.get("env", [])
        if "valueFrom" in variable
    ]
    options = one(choice, "RayCluster")["spec"].get("gcsFaultToleranceOptions")
    found += [options["redisPassword"]["valueFrom"]] if options else []
    for source in found:
        assert source["secretKeyRef"]["key"] in SECRETS[source["secretKeyRef"]["name"]]


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_files_that_the_program_is_told_of_are_mounted(choice: Choice) -> None:
    for pod, name in (("moeserve-headgroup", "deployer"), ("moeserve-headgroup", "ray-head"), ("moeserve-frontend", "frontend")):
        told = {value for variable, value in environment(choice, name).items() if variable.endswith(FILES)}
        arguments = container(choice, "deployer" if pod == "moeserve-headgroup" else name)[
            "args"
        ]  # the controller runs beside the deployer
        told |= {value for _, _, value in (argument.partition("=") for argument in arguments) if value.startswith("/")}
        told |= {argument for argument in arguments if argument.startswith("/")}
        assert told
        mounts = {mount["mountPath"]: mount["name"] for mount in container(choice, name)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pods_named(choice, pod).spec["volumes"]}
        for path in told:
            assert path in mounts or provides(volumes[mounts[path.rpartition("/")[0]]], path.rpartition("/")[2]), (name, path)


def provides(volume: Manifest, key: str) -> bool:
    secret = volume["secret"]
    assert key in SECRETS[secret["secretName"]]
    return "items" not in secret or {"key": key, "path": key} in secret["items"]


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_the_tls_secret_is_waited_for_where_it_is_used(choice: Choice) -> None:
    found = [volume["secret"] for each in pods(choice) for volume in each.spec.get("volumes", []) if volume["name"] == "tls"]
    assert len(found) == 2
    assert {secret.get("optional", False) for secret in found} == {"tls" not in choice.components}


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_accounts_exist_and_have_no_rights_of_ours(choice: Choice) -> None:
    accounts = {manifest["metadata"]["name"] for manifest in kinds(choice, "ServiceAccount")}
    assert {each.spec["serviceAccountName"] for each in pods(choice)} == accounts == {"moeserve", "moeserve-head"}
    # KubeRay gives rights to the account of the head: nobody else may have it.
    assert [each.name for each in pods(choice) if each.spec["serviceAccountName"] == "moeserve-head"] == ["moeserve-headgroup"]
    assert not [manifest for kind in ("Role", "ClusterRole", "RoleBinding") for manifest in kinds(choice, kind)]


@pytest.mark.parametrize(
    "choice", [choice for choice in choices() if any(name.startswith("autoscaling") for name in choice.components)], ids=str
)
def test_autoscalers_scale_something_and_nobody_else_sets_its_number(choice: Choice) -> None:
    deployment = one(choice, "Deployment")
    targets = [
        manifest["spec"]["scaleTargetRef"]["name"]
        for kind in ("HorizontalPodAutoscaler", "ScaledObject")
        for manifest in kinds(choice, kind)
    ]
    assert targets in ([], [deployment["metadata"]["name"]])
    assert ("replicas" in deployment["spec"]) == (not targets)
    cluster = one(choice, "RayCluster")["spec"]
    if cluster.get("enableInTreeAutoscaling"):
        assert cluster["autoscalerOptions"]["version"] == "v2"
        (group,) = cluster["workerGroupSpecs"]
        assert 0 < group["minReplicas"] < group["maxReplicas"]


class Peer:
    """One side of a NetworkPolicy's rule."""

    def __init__(self, labels: dict[str, str], ports: list[Any]) -> None:
        self.labels = labels
        self.ports = [(port["port"], port.get("endPort", port["port"])) for port in ports]


def peers(policy: Manifest, direction: str) -> list[Peer]:
    side = {"ingress": "from", "egress": "to"}[direction]
    return [
        Peer(peer["podSelector"].get("matchLabels", {}), rule.get("ports", []))
        for rule in policy["spec"].get(direction, [])
        for peer in rule.get(side, [])
        if "namespaceSelector" not in peer
    ]


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_policies_select_pods_and_what_one_side_may_send_the_other_may_take(choice: Choice) -> None:
    policies = kinds(choice, "NetworkPolicy")
    for policy in policies:
        assert selected(choice, policy["spec"]["podSelector"].get("matchLabels", {}))
        assert {kind.lower() for kind in policy["spec"]["policyTypes"]} >= {"ingress", "egress"} & policy["spec"].keys()
    allowed: dict[str, set[Any]] = {"ingress": set(), "egress": set()}
    for policy in policies:
        for direction in allowed:
            for peer in peers(policy, direction):
                there = selected(choice, peer.labels)
                assert there, policy["metadata"]["name"]
                for own in selected(choice, policy["spec"]["podSelector"].get("matchLabels", {})):
                    for other in there:
                        way = (own.name, other.name) if direction == "egress" else (other.name, own.name)
                        allowed[direction] |= {(*way, ports) for ports in peer.ports or [(1, 65535)]}
    assert allowed["ingress"] == allowed["egress"]


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_ways_that_are_needed_are_open_and_all_else_is_closed(choice: Choice) -> None:
    (closed,) = (policy for policy in kinds(choice, "NetworkPolicy") if policy["metadata"]["name"] == "default-deny")
    assert closed["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    by_name = {policy["metadata"]["name"]: policy["spec"] for policy in kinds(choice, "NetworkPolicy")}
    assert by_name["callers-to-frontends"]["ingress"][0]["ports"] == [{"port": ServerConfig().port}]
    assert by_name["controller-from-frontends"]["ingress"][0]["ports"] == [{"port": ControllerConfig().control_port}]
    if "monitoring" in choice.components:
        assert by_name["prometheus-to-frontends"]["ingress"][0]["ports"] == [{"port": ServerConfig().metrics_port}]
    # Hosts listen where the kernel lets them; this is its range for every new pod.
    assert by_name["hosts-from-frontends"]["ingress"][0]["ports"] == [{"port": 32768, "endPort": 60999}]
