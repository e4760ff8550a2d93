"""A checkpoint on a file system that does not answer: a change is withdrawn, is in nobody's way, and the service ends when it shall."""

from __future__ import annotations

import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moeserve import Client, ConfigError, ExpertUnavailable
from moeserve.checkpoints.huggingface import HuggingFaceLayer
from moeserve.client import AdminClient
from tests.support.hanging_files import hanging
from tests.support.harness import ServiceHarness
from tests.support.processes import moeserve
from tests.support.seeded_folders import LAYER, configuration, folder, tokens
from tests.support.waiting import until


def test_a_swap_that_hangs_is_withdrawn_and_neither_the_next_nor_the_end_waits_for_it(tmp_path: Path) -> None:
    served, good, bad = (folder(tmp_path / name, seed) for seed, name in enumerate(("served", "good", "bad")))
    worse = folder(tmp_path / "worse", 3)
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text("secret")
    config = tmp_path / "service.toml"
    config.write_text(
        f'[model]\ncheckpoint = "{served}"\n[placement]\nnum_hosts = 2\nload_timeout_s = 3\n[cluster]\nkind = "threads"\n'
        f'[server]\nport = 0\nmetrics_port = 0\nadmin_token_file = "{tmp_path}/token"\n'
    )
    files = [path / "model.safetensors" for path in (bad, worse)]
    with moeserve("serve", str(config)) as process, hanging(files[0]), hanging(files[1]) as until_wanted, ThreadPoolExecutor() as pool:
        assert process.stderr is not None
        target = next(found[1] for line in process.stderr if (found := re.match(r"ready (\S+)", line)))
        with AdminClient(target, "secret") as admin, Client(target) as client:
            with pytest.raises(ConfigError, match=rf"^{bad} could not be read within 3 s \(placement\.load_timeout_s\)"):
                admin.swap(LAYER, bad)
            assert admin.swap(LAYER, good).model_revision == 2
            assert client.forward(tokens(0)).model_revision == 2
            ending = pool.submit(admin.swap, LAYER, worse)
            until_wanted()
            process.send_signal(signal.SIGTERM)
            with pytest.raises((ConfigError, ExpertUnavailable)):
                ending.result()
        assert process.wait(timeout=30) == 0


def test_a_service_whose_checkpoint_hangs_ends_before_it_is_ready(tmp_path: Path) -> None:
    served = folder(tmp_path / "served", 0)
    command = ("serve", str(served), "--cluster", "threads", "--port", "0", "--metrics-port", "0")
    with hanging(served / "model.safetensors") as until_wanted, moeserve(*command) as process:
        until_wanted()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_hosts_that_hang_are_named_and_serve_on_and_keep_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served, good, bad = (folder(tmp_path / name, seed) for seed, name in enumerate(("served", "good", "bad")))
    answers, read, others = threading.Event(), HuggingFaceLayer.experts, set(threading.enumerate())

    def experts(self: HuggingFaceLayer, shards: object) -> object:
        if self.files.folder == bad:
            answers.wait(60)
        return read(self, shards)  # type: ignore[arg-type]

    monkeypatch.setattr(HuggingFaceLayer, "experts", experts)
    config = configuration(served)
    config["placement"] = {**config["placement"], "load_timeout_s": 2.0}
    with ServiceHarness(config, "local", tmp_path) as service, Client(service.target) as client:
        with pytest.raises(ConfigError, match=r"^host-0 could not read one more expert within 2 s"):
            service.call(service.controller.swap(LAYER, bad))
        assert client.forward(tokens(0)).model_revision == 1
        service.call(service.controller.swap(LAYER, good))
        held = [host.host.info.weights_bytes for host in service.hosts]
        expected = client.forward(tokens(0))
        answers.set()
        until(lambda: not [thread for thread in {*threading.enumerate()} - others if thread.name == "moeserve-work"])
        assert client.forward(tokens(0)).hidden_states.equal(expected.hidden_states)
        assert [host.host.info.weights_bytes for host in service.hosts] == held
