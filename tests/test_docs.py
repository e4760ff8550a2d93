"""The documents say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moeserve.config import GatingConfig, LayerConfig, ServiceConfig

ROOT = Path(__file__).parents[1]


def keys() -> list[str]:
    tables = [field.annotation for name, field in ServiceConfig.model_fields.items() if name != "layers"]
    models = [*tables, LayerConfig, GatingConfig]
    return sorted({key for model in models for key in model.model_fields} - {"gating"})


@pytest.mark.parametrize("key", keys())
def test_every_key_is_documented(key: str) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert f"`{key}`" in text or f".{key}`" in text


def test_the_architecture_fits_on_a_page_and_names_every_room() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert text.count("\n") < 80
    for path in (ROOT / "moeserve").iterdir():
        if path.name not in ("__init__.py", "__pycache__", "py.typed"):
            assert f"`{path.name}/`" in text or f"`{path.name}`" in text, path.name


def test_links_between_documents_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as forges make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_to_parts_of_documents_lead_to_a_heading() -> None:
    pages = [page for name in ("*.md", "docs/*.md", "benchmarks/*.md", "benchmarks/results/*.md") for page in ROOT.glob(name)]
    for page in pages:
        for link, part in re.findall(r"\]\(([^):#]*)#([^)]+)\)", page.read_text()):
            target = page.parent / link if link else page
            assert target.suffix != ".md" or part in anchors(target), f"{page.name}: {link}#{part}"


def test_files_that_documents_name_exist() -> None:
    """Those inside the project's folders; a reader makes `k8s/mine`."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for name in re.findall(r"`((?:[\w.-]+/)[\w./*-]*)`", page.read_text()):
            if name.partition("/")[0] in folders and not name.startswith("k8s/mine"):
                assert any(ROOT.glob(name)), f"{page.name}: {name}"


def test_every_metric_and_option_is_documented() -> None:
    """Names from the registry itself and from the commands themselves."""
    import inspect

    from moeserve.cli.bench import bench
    from moeserve.cli.top import top
    from moeserve.cli.trace import trace
    from moeserve.observe.metrics import Metrics

    text = (ROOT / "docs" / "observability.md").read_text()
    counters = {family.name + "_total" * (family.type == "counter") for family in Metrics([]).registry.collect()}
    assert counters == set(re.findall(r"^\| `(moeserve_\w+)`", text, re.M))
    for verb in (bench, top, trace):
        section = text.split(f"## `moeserve {verb.__name__} TARGET`")[1].split("\n## ")[0]
        for name in set(inspect.signature(verb).parameters) - {"target"}:
            assert f"--{name.removeprefix('as_').replace('_', '-')}" in section, name


def test_every_option_of_simulate_and_every_key_of_its_answer_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    import inspect
    import json

    from moeserve.cli.app import main
    from moeserve.cli.simulate import simulate

    section = (ROOT / "docs" / "scaling.md").read_text().split("## What if")[1]
    for name in set(inspect.signature(simulate).parameters) - {"source"}:
        assert f"`--{name.removeprefix('as_').replace('_', '-')}`" in section, name
    assert main(["simulate", "--layers", "1", "--experts", "4", "--top-k", "1", "--hosts", "2", "--fail", "1", "--json"]) == 0
    assert all(f"`{key}`" in section for key in json.loads(capsys.readouterr().out))


def test_every_verb_is_documented() -> None:
    verbs = [match[1] for path in (ROOT / "moeserve" / "cli").glob("*.py") if (match := re.match(r'"""`moeserve (\w+)`', path.read_text()))]
    text = "\n".join(page.read_text() for page in ROOT.glob("docs/*.md"))
    assert {"serve", "top"} < set(verbs)
    assert not [verb for verb in verbs if not re.search(rf"\bmoeserve {verb}\b", text)]


def test_the_tables_are_named_whose_keys_are_flags() -> None:
    """As the options of `serve` are, each of which says of which key it is."""
    import inspect

    from moeserve.cli.serve import serve

    helps = [parameter.annotation.__metadata__[0].help for parameter in inspect.signature(serve).parameters.values()]
    tables = {text.partition(".")[0] for text in helps if re.fullmatch(r"[a-z]+\.[a-z_]+", text)}
    (named,) = re.findall(r"Every scalar key of (.*?) is also a flag", (ROOT / "docs" / "configuration.md").read_text(), re.S)
    assert set(re.findall(r"`\[(\w+)\]`", named)) == tables


def test_every_method_of_the_open_inference_protocol_is_documented() -> None:
    (methods,) = [re.findall(r"rpc (\w+)\(", path.read_text()) for path in (ROOT / "protos" / "inference").glob("*.proto")]
    text = (ROOT / "docs" / "open-inference.md").read_text()
    assert methods and not [method for method in methods if f"`{method}`" not in text]
