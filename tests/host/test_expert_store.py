"""What a host reads, shares and frees when releases come and go; from files, and compared with the layer in one process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeserve import ConfigError, MoELayer
from moeserve.checkpoints import ServedLayers, Swap
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.config import ServedModel, load_config
from moeserve.experts import ExpertBank, ExpertShard
from moeserve.host import Holdings, bytes_of_both, needed_bytes
from moeserve.placement import LayerPlacement, Placement
from moeserve.release import Release
from tests.checkpoints.published_case import HIDDEN, original, published_case
from tests.checkpoints.published_case import LAYER as PUBLISHED_LAYER
from tests.support.checkpoints_on_disk import CONFIG, write_folder
from tests.support.closeness import assert_close
from tests.support.seeded_folders import LAYER, configuration, folder
from tests.support.stacked import in_full

HERE, ELSEWHERE = 0, 1


class Service:
    """Releases of the layers of a configuration; experts that host 0 has not are on host 1."""

    def __init__(self, config: object) -> None:
        self.model = load_config(config).only(ServedModel)  # type: ignore[arg-type]
        self.layers = ServedLayers.read(self.model)
        self.holdings = Holdings(self.model, HERE, torch.device("cpu"))
        self.releases: list[Release] = []

    def release(self, experts: Sequence[int], *swaps: tuple[Path, Sequence[int] | None]) -> Release:
        """The next one: host 0 has these experts of every layer, and the first layer the weights that are swapped in."""
        epoch = len(self.releases) + 1
        units = [np.array([*experts, *(each for each in range(spec.num_experts) if each not in experts)]) for spec in self.layers.specs]
        hosts = [np.array([HERE] * len(experts) + [ELSEWHERE] * (len(each) - len(experts))) for each in units]
        placement = Placement(epoch, 2, tuple(LayerPlacement(2, *each) for each in zip(units, hosts, strict=True)))
        if not self.releases:
            made = Release.first(placement, self.layers.sources)
        else:
            last = self.releases[-1]
            made = Release(placement, last.swaps, last.deployed)
        for path, chosen in swaps:
            swap = Swap(self.layers.specs[0].name, path, None if chosen is None else frozenset(chosen))
            made = made.swapped([swap], self.layers, epoch)
        self.releases.append(made)
        return made

    def take(self, release: Release) -> int:
        """How many experts are read."""
        before = self.holdings.experts_read
        self.holdings.take(release)
        return self.holdings.experts_read - before

    @property
    def held_bytes(self) -> int:
        return self.holdings.store.nbytes

    def planned_bytes(self, release: Release) -> dict[object, int]:
        return needed_bytes(release, release.sources(self.layers), HERE)  # type: ignore[return-value]


def answer(bank: ExpertBank | None, local_expert: int, rows: torch.Tensor) -> torch.Tensor:
    assert bank is not None
    out, everyone = torch.empty(rows.shape, dtype=torch.float32), torch.arange(len(rows))
    bank.run(rows, everyone, torch.full_like(everyone, local_expert), torch.ones(len(rows)), out=out)
    return out


def dense(path: Path) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The experts of a folder, each as it answers."""
    experts = MoELayer.from_checkpoint(path, dtype=torch.float32).bank.experts
    return [in_full(expert) for expert in experts]


def addresses(service: Service, epoch: int) -> list[int]:
    """Where the second projection of each expert is."""
    bank = service.holdings.bank_table.bank(0, epoch)
    assert bank is not None
    return [held.down.data_ptr() if hasattr(held, "down") else held.expert().down_proj.data_ptr() for held in bank.held]  # type: ignore[attr-defined]


ROWS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def test_a_change_of_places_reads_what_is_missing_and_shares_the_rest(tmp_path: Path) -> None:
    path = folder(tmp_path / "served", 0)
    service, exact = Service(configuration(path)), dense(path)
    first, second = service.release([0, 1]), service.release([3, 1, 2])
    assert service.take(first) == 2
    kept = service.held_bytes
    assert service.take(second) == 2
    for release, experts in ((first, [0, 1]), (second, [3, 1, 2])):
        bank = service.holdings.bank_table.bank(0, release.epoch)
        for local, expert in enumerate(experts):
            assert_close(answer(bank, local, ROWS), exact[expert](ROWS))
    assert addresses(service, 1)[1] == addresses(service, 2)[1], "one tensor in both epochs"
    assert service.held_bytes == 2 * kept
    leaving = [weakref.ref(each) for key, each in service.holdings.store.experts.items() if key.shard == ExpertShard(0)]
    del bank
    service.holdings.retire(2)
    assert [each() for each in leaving] == [None]
    assert service.held_bytes == 3 * kept / 2
    assert service.take(service.release([2])) == 0
    service.holdings.withdraw(3)
    assert service.held_bytes == 3 * kept / 2


def test_a_swap_of_one_expert_reads_one(tmp_path: Path) -> None:
    old, new = folder(tmp_path / "old", 0), folder(tmp_path / "new", 1)
    service, exact = Service(configuration(old)), [dense(old), dense(new)]
    service.take(service.release([0, 1, 2]))
    assert service.take(service.release([0, 1, 2], (new, [1]))) == 1
    assert service.take(service.release([0, 1, 2], (new, [3]))) == 0, "it is on another host"
    for local in range(3):
        bank = service.holdings.bank_table.bank(0, 3)
        assert_close(answer(bank, local, ROWS), exact[local == 1][local](ROWS))
        assert_close(answer(service.holdings.bank_table.bank(0, 1), local, ROWS), exact[0][local](ROWS))
    assert addresses(service, 1)[::2] == addresses(service, 3)[::2]
    assert service.take(service.release([0, 1, 2], (old, None))) == 3, "the same files, read for another revision"


def test_what_is_withdrawn_while_it_is_loaded_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, read = Service(configuration(folder(tmp_path / "served", 0))), HuggingFaceLayer.experts
    service.take(service.release([0]))
    held, wanted = service.held_bytes, service.release([0, 1, 2, 3])

    def experts(self: HuggingFaceLayer, shards: Sequence[ExpertShard]) -> object:
        service.holdings.withdraw(2)
        return read(self, shards)

    with monkeypatch.context() as patched:
        patched.setattr(HuggingFaceLayer, "experts", experts)
        with pytest.raises(ConfigError, match="epoch 2 was withdrawn while it was loaded"):
            service.take(wanted)
    assert service.holdings.experts_read == 2, "it stops at the next expert"
    assert service.held_bytes == held
    assert service.take(service.release([0, 1])) == 1


@pytest.mark.parametrize(("served", "other"), [(original, lambda: published_case("fp8")[0]), (lambda: published_case("fp8")[0], original)])
def test_an_expert_in_another_format_is_computed_beside_the_others(served: Callable[[], Path], other: Callable[[], Path]) -> None:
    """The others are not read again for it."""
    service = Service({"model": {"checkpoint": served(), "layers": [PUBLISHED_LAYER], "dtype": "bfloat16"}})
    assert service.take(service.release([0, 1, 2])) == 4
    assert service.take(service.release([0, 1, 2], (other(), [1]))) == 1
    exact = [MoELayer.from_checkpoint(path, PUBLISHED_LAYER, dtype=torch.bfloat16).bank.experts for path in (served(), other())]
    rows = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()
    for local, expert in enumerate([0, 1, 2, 8]):
        ours = answer(service.holdings.bank_table.bank(0, 2), local, rows)
        assert_close(ours, in_full(exact[expert == 1][expert])(rows), summed=4 * HIDDEN, rounded_to=torch.bfloat16)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_store_holds_what_the_releases_in_force_need(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    where = tmp_path_factory.getbasetemp()
    paths = [where / f"seed-{seed}" if (where / f"seed-{seed}").exists() else folder(where / f"seed-{seed}", seed) for seed in range(3)]
    exact = [dense(path) for path in paths]
    service = Service(configuration(paths[0]))
    #: by epoch: the experts here in their order, and for each of all experts, which weights it has: the seed, and the epoch of the swap
    needs: dict[int, list[tuple[int, int, int]]] = {}
    weights = [(0, 0)] * 4
    seen: dict[tuple[int, int, int], weakref.ref[object]] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        step = data.draw(st.sampled_from(["take", "take", "withdraw", "retire"]))
        if step == "take":
            experts = data.draw(st.lists(st.integers(0, 3), unique=True))
            swap = data.draw(st.none() | st.tuples(st.integers(0, 2), st.none() | st.lists(st.integers(0, 3), min_size=1, unique=True)))
            release = service.release(experts, *([] if swap is None else [(paths[swap[0]], swap[1])]))
            if swap is not None:
                chosen = range(4) if swap[1] is None else swap[1]
                weights = [(swap[0], release.epoch) if expert in chosen else each for expert, each in enumerate(weights)]
            held = {need for every in needs.values() for need in every}
            needs[release.epoch] = [(expert, *weights[expert]) for expert in experts]
            assert service.take(release) == len(set(needs[release.epoch]) - held)
        else:
            epoch = data.draw(st.integers(1, len(service.releases) + 1))
            (service.holdings.withdraw if step == "withdraw" else service.holdings.retire)(epoch)
            needs = {each: need for each, need in needs.items() if (each < epoch) is (step == "withdraw")}
        store, held = service.holdings.store, {need for every in needs.values() for need in every}
        assert store.nbytes == len(held) * 3 * 6 * 8 * 4
        assert len(store.experts) == len(held)
        for epoch, need in needs.items():
            bank = service.holdings.bank_table.bank(0, epoch)
            assert (bank is None) is (not need)
            for local, (expert, seed, since) in enumerate(need):
                assert bank is not None
                seen.setdefault((expert, seed, since), weakref.ref(bank.held[local]))
                assert seen[expert, seed, since]() is bank.held[local]
                assert_close(answer(bank, local, ROWS), exact[seed][expert](ROWS))
            del bank
        seen = {key: each for key, each in seen.items() if key in held or each() is not None}
        assert seen.keys() <= held


def resident_bytes() -> int:
    """Without files, which the system may drop."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")) * 1024


def test_a_change_takes_the_memory_that_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, inner, count = 512, 1024, 12
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    tensors = {f"{LAYER}.experts.{e}.{name}.weight": torch.full(shape, 0.01) for e in range(count) for name, shape in shapes.items()}
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_local_experts": count}
    path = write_folder(tmp_path / "large", {**CONFIG, **sizes}, {**tensors, f"{LAYER}.gate.weight": torch.zeros(count, hidden)})
    service, seen, read = Service(configuration(path)), list[int](), HuggingFaceLayer.experts
    old, new, last = service.release(range(8)), service.release(range(1, 9)), service.release([8])
    one = service.layers.sources[0].nbytes(ExpertShard(0))
    service.take(old)
    before = resident_bytes()

    def experts(self: HuggingFaceLayer, shards: Sequence[ExpertShard]) -> object:
        found = read(self, shards)
        seen.append(resident_bytes())
        return found

    monkeypatch.setattr(HuggingFaceLayer, "experts", experts)
    both = service.planned_bytes(old), service.planned_bytes(new)
    assert bytes_of_both(*both, in_stacks=False) == 9 * one
    # Of the nine that there are in all, a stack has eight again, while the one that is new is beside it.
    assert bytes_of_both(*both, in_stacks=True) == (9 + 7 + 1) * one
    fewer = service.planned_bytes(last)
    assert bytes_of_both(both[1], fewer, in_stacks=True) == (8 + 1) * one, "so it is where experts only leave"
    assert bytes_of_both(both[0], fewer, in_stacks=True) == (8 + 1) * one, "all are new"
    assert service.take(new) == 1
    seen.append(resident_bytes())
    assert max(seen) - before < 3 * one
    service.holdings.retire(2)
    service.take(last)
    service.holdings.retire(3)
    assert service.held_bytes == sum(service.planned_bytes(last).values()) == one
    assert resident_bytes() - before < -5 * one


def test_the_shared_expert_is_one_more_and_read_once() -> None:
    layer = {"hidden_size": 8, "intermediate_size": 16, "num_experts": 4, "seed": 0, "shared_expert": {"intermediate_size": 24}}
    service = Service({"layers": [layer, {**layer, "seed": 1}]})
    shared, one = service.layers.sources[0].shared_nbytes(), service.layers.sources[0].nbytes(ExpertShard(0))
    nothing, two, three = service.release([]), service.release([0, 1]), service.release([2, 1, 3])
    assert service.take(nothing) == 0
    assert service.take(two) == 6
    assert service.take(three) == 4
    assert bytes_of_both({}, service.planned_bytes(two), in_stacks=False) == 4 * one + 2 * shared
    assert bytes_of_both(service.planned_bytes(two), service.planned_bytes(three), in_stacks=False) == 8 * one + 2 * shared
    assert service.held_bytes == 8 * one + 2 * shared
    reference = MoELayer(**layer)  # type: ignore[arg-type]
    bank = service.holdings.bank_table.bank(0, three.epoch)
    rows = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    for local, expert in enumerate([2, 1, 3, 4]):
        assert_close(answer(bank, local, rows), in_full(reference.bank.experts[expert])(rows))
