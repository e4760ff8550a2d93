"""Pickles of every protocol: plain values are read as Python reads them, and of the rest nothing is imported, made or run."""

from __future__ import annotations

import copyreg
import pickle
import pickletools
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve.checkpoints.inert_pickle import External, Named, read_pickle

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
#: what needs no name before protocol 4 either
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.lists(inner).map(tuple),
    max_leaves=20,
)


@given(PLAIN, st.sampled_from(PROTOCOLS))
@settings(max_examples=200)
def test_plain_values_are_read_as_python_reads_them(value: Any, protocol: int) -> None:
    assert read_pickle(pickle.dumps(value, protocol)) == value


@given(st.sets(st.integers()), st.frozensets(st.text()), st.binary(), st.integers(min_value=2**2100, max_value=2**2101))
def test_sets_bytes_and_very_long_numbers(numbers: set[int], words: frozenset[str], data: bytes, long: int) -> None:
    value = [numbers, words, data, bytearray(data), long]
    assert read_pickle(pickle.dumps(value, 5)) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_there_twice_is_one_and_may_hold_itself(protocol: int) -> None:
    inner: list[Any] = [1]
    inner.append({"again": inner})
    both = read_pickle(pickle.dumps((inner, inner), protocol))
    assert both[0] is both[1] and both[0][1]["again"] is both[0]
    twice = (inner, [])
    twice[1].append(twice)
    assert read_pickle(pickle.dumps(twice, protocol))[1][0][0][0] == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_are_described(protocol: int) -> None:
    ordered, counted = OrderedDict(a=1, b=[2]), defaultdict(list, {"x": [3]})
    found = read_pickle(pickle.dumps([ordered, counted, deque([1], 5), Path("a/b"), OrderedDict], protocol))
    assert [value.path for value in found[:2]] == ["collections.OrderedDict", "collections.defaultdict"]
    assert [value.items for value in found[:2]] == [{"a": 1, "b": [2]}, {"x": [3]}]
    assert found[2].path == "collections.deque" and found[3].path.startswith("pathlib")
    assert isinstance(found[4], Named) and found[4].path == "collections.OrderedDict"


CANARY = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
def call(*args, **kwargs):
    Path(__file__).with_name("called").touch()
class Thing(dict):
    __new__ = __init__ = __setstate__ = __setattr__ = __setitem__ = update = append = extend = call
"""


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that leaves a trace when it is imported, and another when anything of it is called."""
    (tmp_path / "canary_of_tests.py").write_text(CANARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "canary_of_tests", raising=False)
    copyreg.add_extension("canary_of_tests", "call", 0xF1)
    yield tmp_path
    copyreg.remove_extension("canary_of_tests", "call", 0xF1)
    sys.modules.pop("canary_of_tests", None)


CALL, THING = b"ccanary_of_tests\ncall\n", b"ccanary_of_tests\nThing\n"
STACKED = b"\x8c\x0fcanary_of_tests\x8c\x04call\x93"
HOSTILE = {
    "REDUCE": CALL + b")R.",
    "REDUCE by STACK_GLOBAL": b"\x80\x04" + STACKED + b")R.",
    "REDUCE of what is made": CALL + b")R)R.",
    "INST": b"(icanary_of_tests\ncall\n.",
    "OBJ": b"(" + CALL + b"o.",
    "NEWOBJ": b"\x80\x02" + THING + b")\x81.",
    "NEWOBJ_EX": b"\x80\x04" + THING + b")}\x92.",
    "BUILD": b"\x80\x02" + THING + b")\x81}b.",
    "BUILD of a class": b"\x80\x02" + THING + b"N}\x8c\x01xK\x01s\x86b.",
    "SETITEM": b"\x80\x02" + THING + b")\x81K\x01K\x01s.",
    "APPEND": b"\x80\x02" + THING + b")\x81K\x01a.",
    "EXT1": b"\x80\x02\x82\xf1)R.",
    "EXT4": b"\x80\x02\x84\xf1\x00\x00\x00)R.",
    "eval": b"cbuiltins\neval\n(V__import__('canary_of_tests').call()\ntR.",
    "exec in Python 2's words": b"c__builtin__\nexec\n(Vimport canary_of_tests\ntR.",
    "getattr": b"cbuiltins\ngetattr\n(" + CALL + b"V__call__\ntR)R.",
    "partial": b"cfunctools\npartial\n(" + CALL + b"tR)R.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_imported_made_or_run(name: str, canary: Path) -> None:
    read_pickle(HOSTILE[name])
    assert "canary_of_tests" not in sys.modules
    assert not (canary / "imported").exists() and not (canary / "called").exists()
    with suppress(Exception):
        pickle.loads(HOSTILE[name])
    assert (canary / "imported").exists(), "Python's own reader does it"


DEEP = b")" + b"\x85" * 200_000
#: each holds the one before twice
DOUBLED = b")" + b"2\x86" * 200


@pytest.mark.parametrize("key", [DEEP, DOUBLED], ids=["deep", "doubled"])
@pytest.mark.parametrize("use", [b"}%bK\x01s.", b"(%bK\x01d.", b"\x8f(%b\x90.", b"(%b\x91."], ids=["SETITEM", "DICT", "ADDITEMS", "FROZEN"])
def test_keys_of_tuples_in_each_other_are_not_compared(key: bytes, use: bytes) -> None:
    """Python would need more stack than there is to hash the one, and years for the other."""
    assert [each.path for each in read_pickle(b"\x80\x04" + use % key)] == ["tuple"]


@pytest.mark.parametrize("name", [DOUBLED + b"\x8c\x01a", b"\x8c\x01a" + DOUBLED, b"K\x01K\x02"])
def test_a_name_is_text(name: bytes) -> None:
    with pytest.raises(ValueError, match="a broken pickle: a name that is not text"):
        read_pickle(b"\x80\x04" + name + b"\x93.")


def test_a_name_is_short_and_arguments_are_a_tuple() -> None:
    """Of what a file has once, it could make many copies."""
    with pytest.raises(ValueError, match="a broken pickle: a name of more than 512 characters"):
        read_pickle(b"\x80\x04\x8c\xff" + b"a" * 255 + b"\x94X\xff\x01\0\0" + b"b" * 511 + b"\x93.")
    with pytest.raises(ValueError, match="a broken pickle: arguments that are not a tuple"):
        read_pickle(b"\x80\x04cos\nsystem\n](NNeR.")


def test_what_is_kept_elsewhere_is_a_key() -> None:
    assert read_pickle(b"\x80\x02\x8c\x03keyQ.").key == "key"
    assert read_pickle(b"Pkey\n.").key == "key"
    assert isinstance(read_pickle(b"\x80\x05\x97\x98."), External)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"(.",
        b"N",
        b"\xff.",
        b"h\x07.",
        b"]}\x8c\x01xu.",
        b"}]Ns.",
        b"NNR.",
        b"t.",
        b"I99999x\n.",
        b"X\xff\xff\xff\x7fa.",
    ],
    ids=str,
)
def test_what_is_no_pickle_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="a broken pickle"):
        read_pickle(data)


@given(st.binary(max_size=60) | st.tuples(PLAIN, st.integers(0, 200), st.binary(min_size=1, max_size=3)).map(lambda drawn: spoiled(*drawn)))
@settings(max_examples=300)
def test_whatever_comes_it_is_read_or_refused(data: bytes) -> None:
    try:
        read_pickle(data)
    except ValueError as error:
        assert "a broken pickle" in str(error)


def spoiled(value: Any, place: int, patch: bytes) -> bytes:
    data = pickle.dumps(value, 2)
    return data[: place % len(data)] + patch + data[place % len(data) + len(patch) :]


def test_every_instruction_is_known() -> None:
    from moeserve.checkpoints import inert_pickle

    assert {opcode.name for opcode in pickletools.opcodes} == {*inert_pickle._INSTRUCTIONS, "STOP"}
