"""Everything that is rendered against the schemas of Kubernetes and of KubeRay; unknown fields are errors."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s.manifests import K8S, KUBERNETES, Choice, Manifest, choices, everything, pods, render

CRD = Path(__file__).parent / "crds" / "raycluster-spec.v1.json"
#: of operators whose schemas are not here: what these resources may hold is in their own tests
FOREIGN = {"PodMonitor", "PrometheusRule", "ScaledObject"}
_seen: set[str] = set()


@pytest.mark.parametrize("choice", choices(), ids=str)
def test_it_is_what_kubernetes_knows(choice: Choice) -> None:
    for manifest in render(choice):
        written = json.dumps(manifest, sort_keys=True)
        if written not in _seen:
            check(manifest)
            _seen.add(written)


@pytest.mark.parametrize("choice", everything(), ids=str)
def test_nothing_is_there_twice_and_all_in_one_namespace(choice: Choice) -> None:
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in render(choice)]
    assert len(set(names)) == len(names)
    assert {manifest["metadata"].get("namespace") for manifest in render(choice)} == {None, "moeserve"}
    assert [kind for kind, name in names if kind == "Namespace"] == ["Namespace"]


@pytest.mark.parametrize("path", sorted(K8S.rglob("loader.yaml")), ids=lambda path: path.name)
def test_a_file_that_is_applied_alone_is_known(path: Path) -> None:
    check(yaml.safe_load(path.read_text()))


def test_an_unknown_field_is_noticed() -> None:
    manifest = json.loads(json.dumps(next(each for each in render(Choice("base")) if each["kind"] == "RayCluster")))
    for broken in (manifest["spec"], manifest["spec"]["workerGroupSpecs"][0], manifest["spec"]["headGroupSpec"]["template"]["spec"]):
        broken["colour"] = "red"
        with pytest.raises(jsonschema.ValidationError, match="colour"):
            check(manifest)
        del broken["colour"]
    check(manifest)


def check(manifest: Manifest) -> None:
    if manifest["kind"] == "RayCluster":
        assert manifest["apiVersion"] == "ray.io/v1"
        _raycluster().validate(manifest["spec"])
        # By the schemas of Kubernetes, too, which know more than the definition of KubeRay.
        spec = manifest["spec"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
            _known(template)
    elif manifest["kind"] not in FOREIGN:
        _known(manifest)


def _known(manifest: Manifest) -> None:
    for version in KUBERNETES:
        kubernetes_validate.validate(manifest, version, strict=True)


@cache
def _raycluster() -> Any:
    schema = _strict(json.loads(CRD.read_text()))
    return jsonschema.Draft202012Validator(schema)


def _strict(schema: Any) -> Any:
    """Of objects that list their properties, no others are allowed; Kubernetes' own marks are no part of JSON Schema."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _strict(value) for key, value in schema.items() if not (key.startswith("x-kubernetes") or key in ("default", "format"))}
    closes = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if closes and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept["additionalProperties"] = False
    return kept


def test_ray_is_the_version_that_is_pinned() -> None:
    """KubeRay chooses its probes by it: before 2.53 they need wget, which the image does not have."""
    pinned = dict(line.split("==") for line in (K8S.parent / "constraints.txt").read_text().split())
    (cluster,) = (manifest for manifest in render(Choice("base")) if manifest["kind"] == "RayCluster")
    assert cluster["spec"]["rayVersion"] == pinned["ray"]
    assert {each["image"] for each in pods(Choice("base"))[0].containers} == {"moeserve:cpu"}
