"""As much of kustomize as k8s/ uses, so that its tests run where there is no kubectl; test_rendered.py compares with the real one.

Names of generated ConfigMaps have no hash here.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
_KEYS = {"apiVersion", "kind", "namespace", "resources", "components", "configMapGenerator", "patches", "images", "configurations"}
_CLUSTERWIDE = {"Namespace"}


def build(folder: Path, components: tuple[Path, ...] = ()) -> list[Manifest]:
    """What `kubectl kustomize` makes of a folder and of components beside it, in some order."""
    manifests = [copy.deepcopy(manifest) for manifest in _folder(folder)]
    for component in components:
        _apply(component, manifests)
    # Whoever names a folder and components names the namespace, too.
    _set_namespace(manifests, "moeserve")
    return manifests


@cache
def _folder(folder: Path) -> tuple[Manifest, ...]:
    manifests: list[Manifest] = []
    _apply(folder, manifests)
    return tuple(manifests)


def _apply(folder: Path, manifests: list[Manifest]) -> None:
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert wanted.keys() <= _KEYS, wanted.keys() - _KEYS
    for name in wanted.get("resources", []):
        manifests += build(folder / name) if (folder / name).is_dir() else _read(folder / name)
    for generator in wanted.get("configMapGenerator", []):
        _generate(folder, generator, manifests)
    for name in wanted.get("components", []):
        _apply(folder / name, manifests)
    for patch in wanted.get("patches", []):
        _patch(folder, patch, manifests)
    for image in wanted.get("images", []):
        _set_tag(manifests, image["name"], image["newTag"])
    if "namespace" in wanted:
        _set_namespace(manifests, wanted["namespace"])


def _read(path: Path) -> list[Manifest]:
    # What an alias of YAML stands for is a copy, not the same thing once more.
    return [json.loads(json.dumps(manifest)) for manifest in yaml.safe_load_all(path.read_text())]


def _generate(folder: Path, wanted: Manifest, manifests: list[Manifest]) -> None:
    data = dict(literal.split("=", 1) for literal in wanted.get("literals", []))
    for file in wanted.get("files", []):
        key, _, name = file.rpartition("=")
        data[key or name] = (folder / name).read_text()
    metadata: Manifest = {"name": wanted["name"]}
    if labels := wanted.get("options", {}).get("labels"):
        metadata["labels"] = labels
    made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
    there = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == ("ConfigMap", wanted["name"])]
    behavior = wanted.get("behavior", "create")
    assert len(there) == (behavior != "create")
    if behavior == "create":
        manifests.append(made)
    else:
        there[0]["data"] = {**(there[0]["data"] if behavior == "merge" else {}), **data}


def _patch(folder: Path, patch: Manifest, manifests: list[Manifest]) -> None:
    steps = yaml.safe_load((folder / patch["path"]).read_text() if "path" in patch else patch["patch"])
    target = patch["target"]
    there = [each for each in manifests if each["kind"] == target["kind"] and target.get("name") in (None, each["metadata"]["name"])]
    assert there, target
    for manifest in there:
        for step in copy.deepcopy(steps):
            _step(manifest, step)


def _step(manifest: Manifest, step: Manifest) -> None:
    """One operation of RFC 6902."""
    *way, last = step["path"].strip("/").split("/")
    at: Any = manifest
    for part in way:
        at = at[int(part)] if isinstance(at, list) else at[part]
    key: Any = last if isinstance(at, dict) else len(at) if last == "-" else int(last)
    match step["op"]:
        case "add" if isinstance(at, list):
            at.insert(key, step["value"])
        case "add":
            at[key] = step["value"]
        case "replace":
            assert at[key] is not None
            at[key] = step["value"]
        case "remove":
            del at[key]
        case "test":
            assert at[key] == step["value"], step
        case other:
            raise AssertionError(other)


def _set_tag(value: Any, name: str, tag: str) -> None:
    if isinstance(value, dict):
        for container in (*value.get("initContainers", []), *value.get("containers", [])):
            if container["image"].split(":")[0] == name:
                container["image"] = f"{name}:{tag}"
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            _set_tag(each, name, tag)


def _set_namespace(manifests: list[Manifest], namespace: str) -> None:
    for manifest in manifests:
        if manifest["kind"] not in _CLUSTERWIDE:
            manifest["metadata"]["namespace"] = namespace
