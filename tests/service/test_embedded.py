"""A frontend inside a program: it follows as others do, and ends with its program."""

from __future__ import annotations

import copy
import gc
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeserve
from moeserve import Client, EmbeddedClient, MoELayer, MoEServeError
from moeserve.control.record import read_counts
from tests.support.closeness import assert_close
from tests.support.followers import TOKEN
from tests.support.harness import ServiceHarness
from tests.support.held import Held
from tests.support.seen import epochs
from tests.support.two_layers import CONFIG, LAYERS, tokens
from tests.support.waiting import until, until_async

X = tokens(0)
OPEN = [{**layer, "gating": {"top_k": 3, "request_overrides": ["capacity_factor", "noise"]}} for layer in LAYERS]


def near(service: ServiceHarness, **more: Any) -> EmbeddedClient:
    return EmbeddedClient(service.control_target, TOKEN, **more)


PROGRAM = """
import sys, torch, moeserve

client = moeserve.EmbeddedClient(sys.argv[1], timeout=30)
rows = torch.ones(3, 16)
print(client.forward(rows, layer=1).processed.sum().item(), sorted({host.node for host in client.stats().hosts}), flush=True)
input()
"""


def test_a_program_of_the_same_user_needs_no_token_and_ends_by_itself(tmp_path: Path) -> None:
    config = {**CONFIG, "server": {"port": 0, "metrics_port": 0}}
    with moeserve.serve(config, cluster="threads") as service:
        frontends = service._service.program.frontends
        command = [sys.executable, "-c", PROGRAM, service.target]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            try:
                assert program.stdout is not None and program.stdin is not None
                assert program.stdout.readline() == "9 ['this-process']\n"
                until(lambda: all(one.is_ready for one in frontends.members()))
                (_, member) = frontends.members()
                assert str(program.pid) in member.name and member.node == "this-process"
                program.stdin.write("\n")
                program.stdin.flush()
                assert program.wait(30) == 0
            finally:
                program.kill()
        until(lambda: len(frontends.members()) == 1 and not frontends._absent)  # it has said that it leaves


def test_it_follows_as_any_frontend(tmp_path: Path) -> None:
    reference = MoELayer(**LAYERS[0])
    with ServiceHarness(CONFIG, "shm", tmp_path) as service, ExitStack() as stack:
        service.call(service.open_control())
        client = stack.enter_context(near(service, name="inside"))

        def asks(times: int = 5) -> None:
            for seed in range(times):
                assert_close(client.forward(tokens(seed)).hidden_states, reference(tokens(seed)))

        asks()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(asks, 200)
            for hosts, epoch in ((4, 2), (2, 3)):
                assert service.call(service.controller.scale(hosts)).epoch == epoch
                assert epochs(service) == [epoch] * 2
            for host in service.hosts:
                host.stop()
                host.start()
            asking.result()
        member = service.frontends.members()[1]
        assert member.name == "inside" and [frontend.name for frontend in service.controller.status().frontends] == ["serve", "inside"]
        service.call(until_async(lambda: sum(read_counts(service.frontends.members()[1].requested)[0]) == 205 * len(X) * 3))
        assert {call.code: call.count for call in client.stats().calls} == {"OK": 205}


def test_what_it_counts_is_on_the_page_of_its_controller(tmp_path: Path) -> None:
    """Once, also as demand for the balancer, and still after it has left."""
    with ServiceHarness({**CONFIG, "layers": OPEN}, "shm", tmp_path) as service, Client(service.target) as client:
        service.call(service.open_control())
        with near(service) as inside:
            inside.forward(X, layer=1)
            with pytest.raises(MoEServeError):
                inside.forward(X, layer=2)
            until(lambda: client.stats().layers[1].tokens == len(X))
            inside.forward(X, layer=1, capacity_factor=0.5)
            own = inside.stats().layers[1]
        until(lambda: client.stats().layers[1].tokens == 2 * len(X))
        now = client.stats()
        assert torch.equal(now.layers[1].processed, own.processed) and torch.equal(now.layers[1].dropped, own.dropped)
        assert own.dropped.sum() > 0
        assert {call.code: call.count for call in now.calls if call.method == "Forward"} == {"OK": 2, "NOT_FOUND": 1}
        (durations,) = (one for one in now.requests if one.name == "Forward")
        assert sum(durations.counts) == 3 and durations.sum_s > 0
        with urllib.request.urlopen(f"http://{service.service.metrics_target}/metrics") as page:
            assert 'moeserve_stage_duration_seconds_count{stage="experts"} 2.0' in page.read().decode()
        client.forward(X)
        # Its own frontend tells the balancer of what it was asked itself.
        service.call(until_async(lambda: [counts.sum() for counts in read_counts(service.frontends.members()[0].requested)] == [90, 0]))


def test_without_its_controller_it_serves_on(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        with near(service) as client:
            expected = client.forward(X).hidden_states
            service.call(service.close_control())
            for _ in range(3):
                assert_close(client.forward(X).hidden_states, expected)
            service.call(service.reopen_control(service_id="another"))
            # A frontend cannot follow another deployment: the next call begins a new one.
            until(lambda: client._frontend is not None and client._frontend.is_over)
            assert_close(client.forward(X).hidden_states, expected)
            assert client.ready()


def test_a_running_call_goes_on_with_the_next_deployment(tmp_path: Path) -> None:
    """It does not wait until its deadline for hosts of the one that is gone."""
    with ServiceHarness({**CONFIG, "placement": {"num_hosts": 1}}, "shm", tmp_path) as service, ThreadPoolExecutor(1) as pool:
        service.call(service.open_control())
        with near(service) as client:
            expected = client.forward(X).hidden_states
            held, first = Held(service.hosts[0]), client._frontend
            running = pool.submit(client.forward, X)
            assert held.begun.acquire(timeout=30)
            service.call(service.close_control())
            service.call(service.reopen_control(service_id="another"))
            until(lambda: client._frontend is not first)
            held.let_go()
            assert_close(running.result(30).hidden_states, expected)


def test_who_is_not_there_or_does_not_let_it_in(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        for token in ("wrong", None):
            with EmbeddedClient(service.control_target, token) as client:
                for _ in range(2):
                    with pytest.raises(moeserve.Unauthenticated, match="frontend token is missing or wrong"):
                        client.forward(X)
        with EmbeddedClient(service.target, "wrong") as client, pytest.raises(moeserve.PermissionDenied, match="does not accept frontends"):
            client.ready()
    for options in ({"timeout": 0.5}, {"retry": False}):
        with EmbeddedClient("127.0.0.1:1", **options) as client:
            assert client.ready() is False
            for kind in (client, Client("127.0.0.1:1", **options)):
                until(partial(is_said_to_be_unavailable, kind))
    for wrong in ({"controller": "nowhere"}, {"token": 3}, {"tls": "no"}, {"timeout": -1}):
        with pytest.raises(moeserve.ConfigError):
            EmbeddedClient(**{"controller": "127.0.0.1:1", **wrong})


def is_said_to_be_unavailable(client: Client | EmbeddedClient) -> bool:
    """Or whether a call has ended before that was known."""
    try:
        client.layers()
    except moeserve.ExpertUnavailable as error:
        return "127.0.0.1:1 is unavailable" in str(error)
    except moeserve.DeadlineExceeded:
        return False
    raise AssertionError("it has answered")


def test_calls_end_at_their_deadline_and_when_it_is_closed(tmp_path: Path) -> None:
    with ServiceHarness({**CONFIG, "placement": {"num_hosts": 1}}, "shm", tmp_path) as service, ThreadPoolExecutor(2) as pool:
        service.call(service.open_control())
        client = near(service)
        client.forward(X)
        until(lambda: client._frontend is not None and client._frontend.engine._admission.backlog.is_idle)  # else it may be refused
        held = Held(service.hosts[0])
        with pytest.raises(moeserve.DeadlineExceeded):
            client.forward(X, timeout=0.2)
        running = [pool.submit(client.forward, X) for _ in range(2)]
        assert held.begun.acquire(timeout=30)
        until(lambda: client.stats().queue_tokens == 2 * len(X))
        client.close()
        for call in running:
            with pytest.raises(moeserve.Cancelled, match="closed"):
                call.result(30)
        held.let_go()
        with pytest.raises(MoEServeError, match="is closed"):
            client.forward(X)
        client.close()


def test_a_call_that_waits_for_the_controller_ends_when_it_is_closed(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service, ThreadPoolExecutor(1) as pool:
        service.call(service.open_control())
        client, goes_on = near(service), threading.Event()
        service._thread.soon(goes_on.wait)  # the controller stands still
        try:
            running = pool.submit(client.forward, X, timeout=60)
            until(lambda: client._frontend is not None and client._frontend._followed is not None)
            client.close()
            with pytest.raises(moeserve.Cancelled, match="closed"):
                running.result(30)
        finally:
            goes_on.set()


def test_clients_that_give_up_a_silent_controller_disturb_no_other(caplog: pytest.LogCaptureFixture) -> None:
    """gRPC tells all event loops of a process by one of them, which complained when one was closed before its reading had ended."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for _ in range(3):
            client = EmbeddedClient(f"127.0.0.1:{silent.getsockname()[1]}", TOKEN, retry=False)
            with client, pytest.raises(moeserve.DeadlineExceeded):
                client.forward(X, timeout=0.1)
    assert not caplog.records


@pytest.mark.parametrize("name", ["\udcff", "two\nlines", "x" * 257, 7])
def test_a_name_that_no_controller_takes_is_refused_at_once(name: Any) -> None:
    with pytest.raises(moeserve.ConfigError, match="allowed: at most 256 printable characters"):
        EmbeddedClient("127.0.0.1:1", name=name)


@pytest.mark.slow
def test_the_time_until_the_controller_answers_is_part_of_that_of_a_call(tmp_path: Path) -> None:
    with ServiceHarness({**CONFIG, "placement": {"num_hosts": 1}}, "shm", tmp_path) as service:
        service.call(service.open_control())
        held = Held(service.hosts[0])
        with near(service) as client:
            service._thread.soon(time.sleep, 3)  # so long the controller stands still
            began = time.monotonic()
            with pytest.raises(moeserve.DeadlineExceeded):
                client.forward(X, timeout=4)
            assert time.monotonic() - began < 6
        held.let_go()


def test_ctrl_c_gives_a_call_up_and_the_next_one_works(tmp_path: Path) -> None:
    with ServiceHarness({**CONFIG, "placement": {"num_hosts": 1}}, "shm", tmp_path) as service, ExitStack() as stack:
        service.call(service.open_control())
        client = stack.enter_context(near(service))
        expected = client.forward(X).hidden_states
        held = Held(service.hosts[0])
        stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))  # not a verb's

        def interrupt() -> None:
            assert held.begun.acquire(timeout=30)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        with ThreadPoolExecutor(1) as pool:
            interrupting = pool.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                client.forward(X)
            interrupting.result()
        held.let_go()
        assert_close(client.forward(X).hidden_states, expected)
        until(lambda: client.stats().queue_tokens == 0)


def test_copies_have_frontends_of_their_own_and_garbage_leaves(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        client = near(service)
        client.forward(X)
        other = copy.deepcopy(client)
        other.forward(X)
        assert len(service.frontends.members()) == 3
        del client, other
        gc.collect()
        until(lambda: len(service.frontends.members()) == 1)


def test_a_model_generates_over_it() -> None:
    """With its experts in the service, as with all of it in one process."""
    folder = Path(__file__).parents[2] / "examples" / "tiny-moe"
    config = {"model": {"checkpoint": folder}, "placement": {"num_hosts": 2}, "server": {"port": 0, "metrics_port": 0}}
    prompt = AutoTokenizer.from_pretrained(folder)("The import statement", return_tensors="pt")
    with moeserve.serve(config, cluster="threads") as service, torch.no_grad():
        models: list[Any] = [moeserve.load_model(folder, service.target, embedded=True), AutoModelForCausalLM.from_pretrained(folder)]
        ours, theirs = (model.generate(**prompt, max_new_tokens=20, do_sample=False) for model in models)
        assert torch.equal(ours, theirs)
        (_, member) = service._service.program.frontends.members()
        assert member.name.endswith("(embedded)")
