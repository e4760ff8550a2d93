"""Every combination rendered by the real kustomize, which must come to what the other tests look at."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.k8s.kustomize import Manifest
from tests.k8s.manifests import K8S, Choice, choices, render

GENERATED = ("moeserve-service", "moeserve-settings")


@cache
def program() -> list[str]:
    """Skips the test where there is nothing that renders, or something too old for components."""
    if found := shutil.which("kustomize"):
        return [found, "build"]
    if found := shutil.which("kubectl"):
        said = subprocess.run([found, "version", "--client", "--output=json"], capture_output=True, text=True, timeout=30, check=False)
        known = json.loads(said.stdout) if said.returncode == 0 else {}
        if int(known.get("kustomizeVersion", "v0").removeprefix("v").split(".")[0]) >= 4:
            return [found, "kustomize"]
    pytest.skip("neither kustomize nor a kubectl of at least 1.24 is installed, so k8s/ was rendered by the tests' own means alone")


@pytest.mark.parametrize("choice", choices(), ids=str)
def test_kustomize_makes_the_same_of_it(choice: Choice, tmp_path: Path) -> None:
    here = tmp_path.resolve()
    wanted: Manifest = {"namespace": "moeserve", "resources": [os.path.relpath(K8S / choice.overlay, here)]}
    wanted["components"] = [os.path.relpath(K8S / "components" / name, here) for name in choice.components]
    (here / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
    done = subprocess.run([*program(), str(here)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    # A name with a hash that is not that of a ConfigMap would be left alone here, and be found to differ.
    hashed = set(re.findall(rf"^  name: ((?:{'|'.join(GENERATED)})-[a-z0-9]{{10}})$", done.stdout, re.M))
    assert {name.rpartition("-")[0] for name in hashed} == set(GENERATED)
    text = done.stdout
    for name in hashed:
        text = text.replace(name, name.rpartition("-")[0])
    assert in_order(yaml.load_all(text, yaml.CSafeLoader)) == in_order(render(choice))


def in_order(manifests: object) -> list[Manifest]:
    return sorted(manifests, key=lambda each: (each["kind"], each["metadata"]["name"]))  # type: ignore[call-overload, no-any-return]
