"""The arena against a model of it, and what a shared memory file must look like."""

from __future__ import annotations

import mmap
import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeserve.errors import ConfigError, Overloaded
from moeserve.memory import Arena, Block, UnsafeMemory, create_shared, give_back_pools, map_shared
from moeserve.transport.memory import Limits
from tests.support.descriptors import open_files

KIB = 1024


@given(st.lists(st.tuples(st.integers(1, 40 * KIB), st.integers(0, 5)), max_size=60))
def test_lent_blocks_never_overlap_and_all_memory_comes_back(steps: list[tuple[int, int]]) -> None:
    arena = Arena.private(64 * KIB)
    lent: list[Block] = []
    for nbytes, returned in steps:
        del lent[:returned]
        try:
            lent.append(arena.lend(nbytes))
        except Overloaded:
            assert lent, "an empty arena has room for every block it may be asked for"
        spans = sorted((block.offset, block.offset + len(block.memory)) for block in lent)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert all(end <= 64 * KIB for _, end in spans)
    lent.clear()
    assert len(arena.lend(64 * KIB).memory) == 64 * KIB


def test_what_was_returned_last_is_lent_first() -> None:
    arena = Arena.private(64 * KIB)
    blocks = [arena.lend(5 * KIB) for _ in range(4)]
    offsets = [block.offset for block in blocks]
    del blocks[2]
    del blocks[0]
    assert arena.lend(5 * KIB).offset == offsets[0]


def test_a_block_is_never_larger_than_the_arena() -> None:
    with pytest.raises(Overloaded):
        Arena.private(64 * KIB).lend(64 * KIB + 1)


def test_pages_that_are_not_lent_go_back_to_the_kernel_and_the_lent_ones_stay() -> None:
    fd, memory = create_shared(1024 * KIB)
    shared, private = Arena(memory), Arena.private(1024 * KIB)
    for arena in (shared, private):
        blocks = [arena.lend(100 * KIB) for _ in range(6)]
        for block in blocks:
            block.memory[:] = b"x" * len(block.memory)
        kept = blocks[2]
        del blocks, block
        give_back_pools()
        assert bytes(kept.memory) == b"x" * len(kept.memory)
        again = [arena.lend(100 * KIB) for _ in range(6)]
        assert not any(any(block.memory) for block in again)
        again[0].memory[:] = kept.memory
        del kept, again
    give_back_pools()
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)


def test_pages_that_the_kernel_does_not_take_back_stay() -> None:
    """As in gVisor, which has no MADV_REMOVE, and in a process whose memory is locked."""
    arena = Arena(mmap.mmap(-1, 64 * KIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), mmap.MADV_REMOVE)
    arena.lend(64 * KIB).memory[:1] = b"x"
    give_back_pools()
    assert bytes(arena.lend(64 * KIB).memory[:1]) == b"x"


def test_memory_that_cannot_be_had_leaves_no_descriptor_open() -> None:
    before = open_files()
    with pytest.raises(OSError):
        create_shared(2**60)
    assert open_files() <= before


def test_both_sides_see_the_same_bytes() -> None:
    fd, ours = create_shared(64 * KIB)
    theirs = map_shared(fd, 64 * KIB)
    os.close(fd)
    ours[5:8] = b"moe"
    assert theirs[5:8] == b"moe"


def test_shared_memory_must_be_sealed_and_of_the_announced_size() -> None:
    fd, _ = create_shared(64 * KIB)
    with pytest.raises(OSError):
        os.ftruncate(fd, 0)
    with pytest.raises(UnsafeMemory):
        map_shared(fd, 128 * KIB)
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 64 * KIB)
    with pytest.raises(UnsafeMemory):
        map_shared(unsealed, 64 * KIB)
    read, write = os.pipe()
    with pytest.raises(UnsafeMemory):
        map_shared(read, mmap.PAGESIZE)
    for open_fd in (fd, unsealed, read, write):
        os.close(open_fd)


@pytest.mark.parametrize(("message", "pool"), [(1, 3 * 4096), (1, 2048), (8193, 8192), (0, 8192)])
def test_impossible_limits_are_named(message: int, pool: int) -> None:
    with pytest.raises(ConfigError, match=r"max_(message|pool)_bytes"):
        Limits(message, pool)
