"""`moeserve frontend` as a user runs it: processes of their own, which follow a service that needs no Ray here."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from moeserve import AsyncClient, Client, ExpertUnavailable, ForwardOutput, MoELayer
from moeserve.cli.app import main
from moeserve.config import ServerConfig
from moeserve.control import timing
from moeserve.programs.frontend import FrontendProgram
from moeserve.programs.grpc_orders import GrpcOrders
from tests.support.closeness import assert_close
from tests.support.followers import TOKEN, FrontendProcess
from tests.support.harness import ServiceHarness
from tests.support.ports import kept_port
from tests.support.seeded_folders import LAYER, configuration, folder, tokens
from tests.support.seen import epochs
from tests.support.two_layers import CONFIG, answers
from tests.support.waiting import until_async


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    (tmp_path / "frontend-token").write_text(TOKEN)
    return tmp_path / "frontend-token"


def test_two_of_them_scale_and_swap_under_load_of_eight_callers(tmp_path: Path, token_file: Path) -> None:
    """No request fails, none is wrong, and none is answered with the weights of two epochs."""
    folders = [folder(tmp_path / str(seed), seed) for seed in range(3)]
    references = [MoELayer.from_checkpoint(path, dtype=torch.float32) for path in folders]
    stop, answered = threading.Event(), threading.Semaphore(0)

    def caller(target: str, number: int) -> list[tuple[int, ForwardOutput]]:
        got: list[tuple[int, ForwardOutput]] = []
        with Client(target) as client:
            while not stop.is_set():
                got.append((1000 * number + len(got), client.forward(tokens(1000 * number + len(got)))))
                answered.release()
        return got

    def goes_on() -> None:
        for _ in range(60):
            assert answered.acquire(timeout=30)

    with ServiceHarness(configuration(folders[0]), "shm", tmp_path) as service, ExitStack() as stack:
        service.call(service.open_control())
        processes = [stack.enter_context(FrontendProcess(service.control_target, token_file, "--name", name)) for name in ("a", "b")]
        targets = [process.target for process in processes]
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(caller, targets[number % 2], number) for number in range(8)]
            try:
                goes_on()
                changes = (
                    lambda: service.controller.scale(4),
                    lambda: service.controller.swap(LAYER, folders[1]),
                    lambda: service.controller.scale(2),
                    lambda: service.controller.swap(LAYER, folders[2]),
                    lambda: service.controller.drain("host-0"),
                )
                for epoch, change in enumerate(changes, 2):
                    assert service.call(change()).epoch == epoch
                    assert epochs(service) == [epoch] * 3
                    goes_on()
            finally:
                stop.set()
            got = [future.result() for future in running]
        for process in processes:
            process.process.send_signal(signal.SIGTERM)
            process.until("^stopped$")
            assert process.process.wait(timeout=30) == 0
        service.call(until_async(lambda: epochs(service) == [6] and service.followers == frozenset()))
    for of_target in (got[::2], got[1::2]):
        assert {answer.model_revision for given in of_target for _, answer in given} == {1, 2, 3}
    for seed, answer in (one for given in got for one in given):
        assert_close(answer.hidden_states, references[answer.model_revision - 1](tokens(seed)))


@pytest.fixture
def two(tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ServiceHarness, list[FrontendProcess]]]:
    """A service and two frontends, the second of which has stopped; the controller has little patience."""
    monkeypatch.setattr(timing, "GRACE_S", 0.5)
    with ServiceHarness({**CONFIG, "resilience": {"request_timeout_s": 2.0}}, "shm", tmp_path) as service, ExitStack() as stack:
        service.call(service.open_control())
        processes = [stack.enter_context(FrontendProcess(service.control_target, token_file)) for _ in range(2)]
        for process in processes:
            answers(process.target)
        processes[1].process.send_signal(signal.SIGSTOP)
        yield service, processes


def test_one_that_is_killed_during_a_roll_out_does_not_hold_it_up(
    two: tuple[ServiceHarness, list[FrontendProcess]], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, (_, killed) = two
    monkeypatch.setattr(service.frontends, "_try_timeout_s", 3600.0)
    with ThreadPoolExecutor() as pool:
        scaling = pool.submit(service.call, service.controller.scale(4))
        service.call(until_async(lambda: sorted(member.report.tried_epoch for member in service.frontends._members) == [0, 2, 2]))
        assert not scaling.done()
        os.kill(killed.process.pid, signal.SIGKILL)
        assert scaling.result(timeout=30).epoch == 2
    service.call(until_async(lambda: epochs(service) == [2, 2]))


def test_one_that_hangs_is_left_behind_and_catches_up(two: tuple[ServiceHarness, list[FrontendProcess]]) -> None:
    service, (_, hanging) = two
    assert service.call(service.controller.scale(4)).epoch == 2
    service.call(until_async(lambda: epochs(service) == [2, 2]))  # one that was late, too, is back
    hanging.process.send_signal(signal.SIGCONT)
    service.call(until_async(lambda: epochs(service) == [2, 2, 2]))


@pytest.fixture
def port() -> int:
    """Where nobody listens yet."""
    return kept_port()


async def test_health_tells_the_truth_before_there_is_a_controller(tmp_path: Path, port: int) -> None:
    service = FrontendProgram(ServerConfig(port=0, metrics_port=0), GrpcOrders(f"127.0.0.1:{port}", TOKEN))
    starting = asyncio.create_task(service.start(3600.0))
    await until_async(lambda: service.target)
    async with AsyncClient(service.target) as client:
        assert not await client.ready()
        with pytest.raises(ExpertUnavailable, match="the service is starting and does not yet know what to serve"):
            await client.layers()
        harness = ServiceHarness(CONFIG, "shm", tmp_path)
        await asyncio.to_thread(harness.__enter__)
        try:
            await asyncio.to_thread(harness.call, harness.open_control(port))
            await starting
            assert await client.ready()
            await asyncio.to_thread(answers, service.target)
            await service.stop()
        finally:
            await asyncio.to_thread(harness.__exit__, None, None, None)


def test_no_controller_is_exit_code_3(token_file: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"127.0.0.1:{port}"
    command = ["frontend", "--controller", target, "--frontend-token-file", str(token_file), "--port", "0", "--metrics-port", "0"]
    assert main([*command, "--timeout", "0"]) == 3
    assert f"error: no controller was reached: {target} is unavailable" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--frontend-token-file", "nowhere"], "token file nowhere cannot be read"),
        (["--host", "0.0.0.0"], "server.host 0.0.0.0 can be reached from other machines"),
        (["--port", "70000"], "server: port: Input should be less than or equal to 65535"),
        (["--tls-ca", "nowhere"], "TLS file nowhere cannot be read"),
        (["--name", "\udcff"], "the name of a frontend is '\\udcff'; allowed: at most 256 printable characters"),
    ],
)
def test_what_is_wrong_with_it_is_exit_code_2(
    token_file: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["frontend", "--controller", "127.0.0.1:1", "--frontend-token-file", str(token_file), "--port", "0", "--metrics-port", "0"]
    assert main([*command, *flags]) == 2
    assert sentence in capsys.readouterr().err


def test_a_checkpoint_that_is_not_here_is_said(tmp_path: Path, token_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path / "model", 0)
    with ServiceHarness(configuration(source), "shm", tmp_path) as service:
        service.call(service.open_control())
        source.rename(tmp_path / "elsewhere")
        command = ["frontend", "--controller", service.control_target, "--frontend-token-file", str(token_file), "--port", "0"]
        assert main([*command, "--metrics-port", "0"]) == 2
    assert "model/config.json" in capsys.readouterr().err.replace("model does", "model/config.json does")
