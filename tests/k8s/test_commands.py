"""What containers are started with, against the code: verbs, flags, variables, ports, files, names of health services."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from moeserve.cli.verbs import app
from moeserve.config import ServerConfig, ServiceConfig, load_config
from moeserve.config.service import ControllerConfig
from moeserve.server.health import LIVENESS
from tests.k8s.manifests import Choice, Manifest, container, environment, everything, one, plain, pods, pods_named

ALL = [*plain(), *everything()]
#: containers that run moeserve's verbs, and what they are given beside the environment
VERBS = {"deployer": "deploy", "frontend": "frontend"}
#: what programs other than moeserve read
FOREIGN = {"NVIDIA_VISIBLE_DEVICES", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "REDIS_PASSWORD"}


def command(verb: str) -> Any:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert verb in commands, f"moeserve has no verb {verb}"
    return commands[verb]


def said(choice: Choice, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `moeserve` makes of a container's arguments and environment, by the real parser."""
    for variable, value in {"MOESERVE_HOST": "0.0.0.0", **environment(choice, name)}.items():  # the first is of the image
        monkeypatch.setenv(variable, value)
    verb, *arguments = container(choice, name)["args"]
    assert verb == VERBS[name]
    return {key: value for key, value in command(verb).make_context(verb, arguments).params.items() if value is not None}


def variables(verb: str) -> set[str]:
    return {str(option.envvar) for option in command(verb).params if getattr(option, "envvar", None)}


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_every_variable_is_read_by_somebody(choice: Choice) -> None:
    known = set().union(*(variables(verb) for verb in VERBS.values())) | FOREIGN
    for each in pods(choice):
        for found in each.containers:
            assert set(environment(choice, found["name"])) <= known, found["name"]


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_the_deployer_is_understood(choice: Choice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = said(choice, "deployer", monkeypatch)
    assert given["keep"] is True and given["address"] == "127.0.0.1:6379"
    assert given["control_host"] == given["host"] == "0.0.0.0" and given["frontends"] == 0
    assert given["insecure"] is ("tls" not in choice.components)
    (tmp_path / "service.toml").write_text(service(choice))
    config = load_config(tmp_path / "service.toml", by_table(given))
    assert config.placement.num_hosts == (2 if "autoscaling" in choice.components else "all")
    assert (config.placement.wait_for_nodes_s > 0) == ("autoscaling" in choice.components)


def by_table(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """As the command hands them to `load_config`."""
    tables: dict[str, Any] = {name: field.annotation for name, field in ServiceConfig.model_fields.items() if name != "layers"}
    return {
        table: {key: value for key, value in given.items() if key in model.model_fields and key != "address"}
        for table, model in tables.items()
    }


def service(choice: Choice) -> str:
    (volume,) = (volume for volume in pods_named(choice, "moeserve-headgroup").spec["volumes"] if volume["name"] == "service")
    text: str = one(choice, "ConfigMap", volume["configMap"]["name"])["data"]["service.toml"]
    return text


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_a_frontend_is_understood(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    given = said(choice, "frontend", monkeypatch)
    name, port = given["controller"].split(":")
    assert one(choice, "Service", name)["spec"]["ports"][0]["port"] == int(port)
    assert given["host"] == "0.0.0.0" and given["insecure"] is ("tls" not in choice.components)
    assert "admin_token_file" not in given
    assert ("tls_ca" in given) == ("tls_cert" in given) == ("auth_token_file" in given) == ("tls" in choice.components)


@pytest.mark.parametrize("choice", plain(), ids=str)
def test_ports_are_those_of_the_code(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    server, controller = ServerConfig(), ControllerConfig()
    health = said(choice, "frontend", monkeypatch)["health_port"]
    assert ports(container(choice, "frontend")) == {"grpc": server.port, "health": health, "metrics": server.metrics_port}
    assert ports(container(choice, "ray-head"))["control"] == controller.control_port
    assert len({server.port, server.metrics_port, health, controller.control_port}) == 4


def ports(found: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in found["ports"]}


@pytest.mark.parametrize("choice", plain(), ids=str)
def test_probes_ask_for_what_the_health_service_tells(choice: Choice) -> None:
    found = container(choice, "frontend")
    health = ports(found)["health"]
    assert found["startupProbe"]["grpc"] == found["livenessProbe"]["grpc"] == {"port": health, "service": LIVENESS}
    assert found["readinessProbe"]["grpc"].get("service", "") == "" and found["readinessProbe"]["grpc"]["port"] == health
    for each in pods(choice):
        for other in each.containers:  # KubeRay adds those of Ray's containers
            if other["name"] not in ("deployer", "ray-head", "ray-worker"):
                assert {"startupProbe", "livenessProbe", "readinessProbe"} <= other.keys(), other["name"]


@pytest.mark.parametrize("choice", plain(), ids=str)
def test_what_runs_before_a_pod_stops_has_time_to_end(choice: Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = pods_named(choice, "moeserve-frontend")
    program, pause = frontend.container("frontend")["lifecycle"]["preStop"]["exec"]["command"]
    drain = said(choice, "frontend", monkeypatch).get("drain_timeout_s", ServerConfig().drain_timeout_s)
    assert program == "sleep" and int(pause) + drain < frontend.spec["terminationGracePeriodSeconds"]
    experts = pods_named(choice, "moeserve-experts")
    program, verb, *arguments = experts.container("ray-worker")["lifecycle"]["preStop"]["exec"]["command"]
    assert (program, verb) == ("moeserve", "leave")
    timeout_s = command(verb).make_context(verb, arguments).params["timeout_s"]
    assert 0 < timeout_s < experts.spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("choice", ALL, ids=str)
def test_hosts_fit_into_their_pods(choice: Choice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "service.toml").write_text(service(choice))
    placement = load_config(tmp_path / "service.toml").placement
    cpus_per_host = said(choice, "deployer", monkeypatch).get("cpus_per_host", placement.cpus_per_host)
    limits = container(choice, "ray-worker")["resources"]["limits"]
    assert float(limits["cpu"]) == cpus_per_host * max(1, int(limits.get("nvidia.com/gpu", 1)) / (placement.gpus_per_host or 1))
    assert bool(placement.gpus_per_host) == ("nvidia.com/gpu" in limits)


@pytest.mark.parametrize("choice", plain(), ids=str)
def test_the_number_of_hosts_is_what_there_are_pods_for(choice: Choice) -> None:
    """A PodDisruptionBudget lets one pod of experts go at a time."""
    replicas = pods_named(choice, "moeserve-experts").replicas
    assert one(choice, "PodDisruptionBudget", "moeserve-experts")["spec"]["minAvailable"] == replicas - 1
