"""docs/kubernetes.md: its commands are real ones, its files exist, its names are those of the manifests."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from functools import cache
from itertools import pairwise

import pytest
import typer
import yaml

from moeserve.cli.verbs import app
from tests.k8s.kustomize import build
from tests.k8s.manifests import K8S, REPOSITORY, SECRETS, Choice, everything, kinds, render

TEXT = (REPOSITORY / "docs" / "kubernetes.md").read_text()
#: what kubectl knows by these names
KINDS = {"raycluster": "RayCluster", "poddisruptionbudget": "PodDisruptionBudget", "deployment": "Deployment", "service": "Service"}


def commands(program: str) -> list[list[str]]:
    """Every command of the document that runs `program`, in blocks and in sentences, cut into words."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.S)).replace("\\\n", " ").splitlines()
    spoken = [text for text in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.S)) if " --" in text]
    found = [shlex.split(line, comments=True) for line in (*blocks, *spoken)]
    return [[word for word in words if word != "&"] for words in found if words and words[0] == program]


def written(words: list[str]) -> str:
    return " ".join(words)


@cache
def helped(*verb: str) -> str:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, *verb, "--help"], capture_output=True, text=True, timeout=30, check=False)
    return done.stdout + subprocess.run([kubectl, "options"], capture_output=True, text=True, timeout=30, check=False).stdout


@pytest.mark.parametrize("words", commands("kubectl"), ids=written)
def test_kubectl_knows_its_verbs_and_flags(words: list[str]) -> None:
    verb = words[1:4] if words[1:3] == ["create", "secret"] else words[1:3] if words[1] in ("rollout", "create") else words[1:2]
    known = set(re.findall(r"(--[a-z-]+)=", helped(*verb)))
    given = words[: words.index("--")] if "--" in words else words
    flags = {word.partition("=")[0] for word in given if word.startswith("--")}
    assert known and flags <= known, flags - known


@pytest.mark.parametrize("words", commands("moeserve"), ids=written)
def test_moeserve_knows_its_verbs_and_flags(words: list[str]) -> None:
    parse(words[1:])


def test_moeserve_is_run_in_containers_with_verbs_it_has() -> None:
    (run,) = (words for words in commands("kubectl") if words[1] == "run")
    parse(run[run.index("--") + 1 :])


def parse(words: list[str]) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[0] in known, f"moeserve has no verb {words[0]}"
    known[words[0]].make_context(words[0], words[1:])


def test_files_that_are_applied_exist() -> None:
    for words in commands("kubectl"):
        for flag, value in pairwise(words):
            if flag == "--kustomize":
                assert value == "k8s/mine" or (REPOSITORY / value / "kustomization.yaml").exists(), value
            if flag == "--filename":
                assert (REPOSITORY / value).exists(), value
    for words in commands("helm"):
        for flag, value in pairwise(words):
            assert flag != "--values" or (REPOSITORY / value).exists(), value
    for path in re.findall(r"`((?:base|overlays|components)[\w/-]*(?:\.\w+)?)`", TEXT):
        assert (K8S / path).exists(), path


def test_every_overlay_and_component_is_told_of() -> None:
    for path in (*K8S.glob("overlays/*"), *K8S.glob("components/*")):
        assert f"`{path.relative_to(K8S)}`" in TEXT, path


def test_resources_that_are_named_exist() -> None:
    for kind, name in re.findall(r"(raycluster|poddisruptionbudget|deployment|service)[/ ](moeserve[\w-]*)", TEXT):
        assert any(manifest["metadata"]["name"] == name for manifest in kinds(Choice("base"), KINDS[kind])), (kind, name)
    assert {words[4] for words in commands("kubectl") if words[1:4] == ["create", "secret", "generic"]} == SECRETS.keys() - {"moeserve"}


def test_secrets_are_made_with_the_keys_that_are_used() -> None:
    for words in commands("kubectl"):
        if words[1:4] == ["create", "secret", "generic"]:
            keys = {word.split("=")[1].partition("=")[0] for word in words if word.startswith("--from-file=")}
            assert keys == SECRETS[words[4]]


def test_the_budget_follows_the_replicas() -> None:
    patches = {words[2]: yaml.safe_load(words[-1].partition("=")[2]) for words in commands("kubectl") if words[1] == "patch"}
    (step,) = patches["raycluster"]
    cluster = render(Choice("base"))
    (there,) = (manifest for manifest in cluster if manifest["kind"] == "RayCluster")
    assert step["path"] == "/spec/workerGroupSpecs/0/replicas" and "replicas" in there["spec"]["workerGroupSpecs"][0]
    assert patches["poddisruptionbudget"]["spec"] == {"minAvailable": step["value"] - 1}


def test_the_certificate_has_the_names_of_the_services() -> None:
    (names,) = re.findall(r'"subjectAltName=([^"]*)"', TEXT)
    for manifest in kinds(everything()[0], "Service"):
        assert f"DNS:{manifest['metadata']['name']}," in names
    assert "DNS:moeserve.moeserve," in names and "DNS:localhost" in names


def test_a_folder_of_ones_own_works(tmp_path_factory: pytest.TempPathFactory) -> None:
    (mine,) = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", TEXT, re.S) if "kind: Kustomization" in text)
    (overlay,) = mine["resources"]
    assert build((K8S / "mine" / overlay).resolve())
    assert mine["images"][0]["name"] == "moeserve"
