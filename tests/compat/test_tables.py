"""Every row of every table is true: the effect shows in the configuration, the note is reported, the refusal is raised."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import pytest

from moeserve.compat import SYSTEMS, load
from moeserve.compat.mindformers import MoEConfig
from moeserve.compat.system import System
from moeserve.compat.table import Case, Param, Required
from moeserve.compat.trustformers import ExpertParallelismConfig, ParallelismConfig
from moeserve.compat.walk import complete
from moeserve.config import ServiceConfig
from moeserve.errors import ConfigError
from tests.support.compat_page import DOCUMENT, OWN, with_tables

from .cases import assert_servable, nested

ROWS = [
    pytest.param(system, param, case, id=f"{system.name}-{param.name}-{case.outcome}-{case.at}")
    for system in SYSTEMS.values()
    for param in system.params
    for case in param.cases
]
PARAMS = [pytest.param(system, param, id=f"{system.name}-{param.name}") for system in SYSTEMS.values() for param in system.params]


def flat_example(system: System, param: Param, case: Case) -> dict[str, Any]:
    return {**system.smallest, **case.beside, param.name: case.example}


def read(config: ServiceConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)  # of a table that is not there
        value = value[0] if name == "layers" else value
    return value


def loadable(system: System, mappings: Iterable[Mapping[str, Any]]) -> Iterator[ServiceConfig]:
    for flat in mappings:
        with suppress(ConfigError):
            yield load(system.name, nested(flat)).config


@pytest.mark.parametrize(("system", "param", "case"), ROWS)
def test_every_row_is_true(system: System, param: Param, case: Case) -> None:
    flat = flat_example(system, param, case)
    values = complete(system, flat)
    assert case.when(values), "the example shows another case"
    if case.outcome == "refusal":
        with pytest.raises(ConfigError) as error:
            load(system.name, nested(flat))
        assert f"{param.name} = " in str(error.value) and case.says in str(error.value)
        return
    imported = load(system.name, nested(flat))
    assert_servable(imported.config)
    if case.outcome == "note":
        assert [note.what for note in imported.notes if note.field == param.name and note.what == case.says]
        return
    keys = case.sets(values)
    assert keys
    for key, value in keys.items():
        shown = read(imported.config, key)
        assert shown == value and type(shown) is type(value)
        assert key.split(".")[0] in case.says or "layers" in case.says, "the document names the key"


@pytest.mark.parametrize(("system", "param"), PARAMS)
def test_every_parameter_with_an_effect_makes_a_difference(system: System, param: Param) -> None:
    effects = [case for case in param.cases if case.outcome == "effect"]
    for case in effects:
        flat = flat_example(system, param, case)
        with_it = load(system.name, nested(flat)).config
        others = [system.smallest, {**system.smallest, **case.beside}, *({**flat, param.name: other.example} for other in effects)]
        keys = case.sets(complete(system, flat))
        if any(read(other, key) != read(with_it, key) for other in loadable(system, others) for key in keys):
            return
    assert not effects


@pytest.mark.parametrize(("system", "param"), PARAMS)
def test_the_default_and_every_listed_value_mean_something(system: System, param: Param) -> None:
    listed = [case.example for case in param.cases]
    if param.default is not Required:
        listed.append(param.default)
    for value in listed:
        values = {**{other.name: other.default for other in system.params}, **system.smallest, param.name: value}
        assert param.accepts.test(value)
        assert any(case.when(values) for case in param.cases) or value is None, value


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_unknown_parameters_and_wrong_values_are_refused(system: System) -> None:
    with pytest.raises(ConfigError, match=rf"{system.name}: 'experts_count' is not a parameter \(got 4\); allowed: .*activation"):
        load(system.name, {**nested(system.smallest), "experts_count": 4})
    with pytest.raises(ConfigError, match=f"{system.name}: seed is 'x'; allowed: an integer of at least 0"):
        load(system.name, {**nested(system.smallest), "seed": "x"})


@pytest.mark.parametrize(("system", "param"), PARAMS)
def test_a_value_of_another_type_is_refused(system: System, param: Param) -> None:
    if param.accepts.says == "anything":
        return
    with pytest.raises(ConfigError, match=rf"{system.name}: {param.name} is .*; allowed: "):
        load(system.name, nested({**system.smallest, param.name: object()}))


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_names_are_unique(system: System) -> None:
    names = [param.name for param in system.params]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "prefix", "original"),
    [
        ("mindformers", "", MoEConfig),
        ("trustformers", "expert_parallelism.", ExpertParallelismConfig),
        ("trustformers", "parallelism.", ParallelismConfig),
    ],
)
def test_classes_and_tables_have_the_same_parameters_and_defaults(name: str, prefix: str, original: type) -> None:
    table = {param.name: param.default for param in SYSTEMS[name].params if param.name not in OWN and param.name.startswith(prefix)}
    signature = inspect.signature(original).parameters.values()
    assert table == {prefix + parameter.name: parameter.default for parameter in signature}


def test_the_document_is_the_tables() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == with_tables(document), "run: python -m tests.support.compat_page"
