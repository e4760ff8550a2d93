"""Whatever is given, the answer is a configuration or one sentence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.compat import SYSTEMS, ImportedConfig, load
from moeserve.errors import ConfigError

from .cases import assert_servable, nested

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


def outcome(system: str, mapping: Any) -> ImportedConfig | str:
    try:
        return load(system, mapping)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("system", SYSTEMS)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_values_of_any_kind(system: str, data: st.DataObject) -> None:
    names = [param.name for param in SYSTEMS[system].params]
    some = data.draw(st.dictionaries(st.sampled_from(names), JSON, max_size=4))
    answer = outcome(system, nested({**SYSTEMS[system].smallest, **some}))
    assert isinstance(answer, ImportedConfig) or (answer and "\n" not in answer)


@pytest.mark.parametrize("system", SYSTEMS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_allowed_values_together(system: str, data: st.DataObject) -> None:
    shown = {param.name: [case.example for case in param.cases] for param in SYSTEMS[system].params}
    some = data.draw(st.fixed_dictionaries({}, optional={name: st.sampled_from(examples) for name, examples in shown.items()}))
    answer = outcome(system, nested({**SYSTEMS[system].smallest, **some}))
    if isinstance(answer, ImportedConfig):
        assert_servable(answer.config)
    else:
        assert answer.startswith(f"{system}: ")


@pytest.mark.parametrize("system", SYSTEMS)
@settings(deadline=None, max_examples=50)
@given(mapping=JSON)
def test_mappings_of_any_kind(system: str, mapping: Any) -> None:
    answer = outcome(system, mapping)
    assert isinstance(answer, ImportedConfig) or "\n" not in answer
