"""Prometheus, Grafana and the autoscalers are told what deploy/ says and what the code measures."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from moeserve.config import ServerConfig
from tests.deploy.files import ALERTS, DEPLOY, read_yaml, series
from tests.k8s.manifests import K8S, Choice, container, kinds, one, pods, strings

WATCHED = Choice("base", ("monitoring", "autoscaling"))
KEDA = Choice("base", ("monitoring", "autoscaling/keda"))


def test_the_rules_are_those_of_deploy() -> None:
    assert one(WATCHED, "PrometheusRule")["spec"] == read_yaml(ALERTS), "run `make k8s`"


def test_the_dashboard_is_that_of_deploy() -> None:
    found = one(WATCHED, "ConfigMap", "moeserve-dashboard")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    (text,) = found["data"].values()
    assert text == (DEPLOY / "grafana" / "dashboards" / "moeserve.json").read_text(), "run `make k8s`"
    json.loads(text)


@pytest.mark.parametrize("choice", [WATCHED, KEDA], ids=str)
def test_every_metric_exists(choice: Choice) -> None:
    scalers = [*kinds(choice, "HorizontalPodAutoscaler"), *kinds(choice, "ScaledObject")]
    assert len(scalers) == 1
    named = {name for text in strings(scalers) for name in re.findall(r"moeserve_\w+", text)}
    assert named == {"moeserve_queue_tokens"} <= series()


def test_the_adapter_answers_what_the_autoscaler_asks() -> None:
    (metric,) = one(WATCHED, "HorizontalPodAutoscaler")["spec"]["metrics"]
    values = yaml.safe_load((K8S / "components" / "autoscaling" / "hpa" / "adapter.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    assert rule["seriesQuery"].partition("{")[0] == metric["pods"]["metric"]["name"]
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_both_ways_of_scaling_frontends_agree() -> None:
    hpa, keda = one(WATCHED, "HorizontalPodAutoscaler")["spec"], one(KEDA, "ScaledObject")["spec"]
    (trigger,) = keda["triggers"]
    assert trigger["metadata"]["threshold"] == hpa["metrics"][0]["pods"]["target"]["averageValue"]
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert int(trigger["metadata"]["threshold"]) < ServerConfig().max_queued_tokens
    assert f'namespace="{one(KEDA, "Namespace")["metadata"]["name"]}"' in trigger["metadata"]["query"]


def test_monitors_select_pods_with_the_port() -> None:
    frontend, ray = (one(WATCHED, "PodMonitor", name)["spec"] for name in ("moeserve-frontend", "ray"))
    assert [each.name for each in pods(WATCHED) if each.is_selected(frontend["selector"]["matchLabels"])] == ["moeserve-frontend"]
    assert {each.labels["ray.io/node-type"] for each in pods(WATCHED) if each.is_selected(ray["selector"]["matchLabels"])} == {
        "head",
        "worker",
    }
    (endpoint,) = frontend["podMetricsEndpoints"]
    (port,) = (port for port in container(WATCHED, "frontend")["ports"] if port["name"] == endpoint["port"])
    assert port["containerPort"] == ServerConfig().metrics_port


def test_alerts_look_at_frontends_and_not_at_ray() -> None:
    """A PodMonitor's job is namespace/name unless it is relabelled; alerts look for moeserve in it."""
    (endpoint,) = one(WATCHED, "PodMonitor", "ray")["spec"]["podMetricsEndpoints"]
    (job,) = (rule["replacement"] for rule in endpoint["relabelings"] if rule["targetLabel"] == "job")
    matchers = set(re.findall(r'job=~"([^"]*)"', ALERTS.read_text()))
    assert matchers
    for matcher in matchers:
        assert not re.fullmatch(matcher, job) and re.fullmatch(matcher, "moeserve/moeserve-frontend")
