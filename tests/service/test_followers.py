"""Frontends elsewhere: they serve as one, whatever happens to them, to their controller and to the hosts."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moeserve import Client, ConfigError, ExpertUnavailable, MoELayer, PermissionDenied, Unauthenticated
from moeserve.api.request import LayerRequest
from moeserve.client import TLS
from moeserve.config import BatchingConfig
from moeserve.control.follow import Report
from moeserve.control.frontends import FollowingFrontend
from moeserve.errors import CheckpointError, ServiceUnreachable
from moeserve.transport import ChannelClosed, FrontendKeys, KeyPair, connect
from tests.support.certificates import Authority
from tests.support.closeness import assert_close
from tests.support.followers import ThreadedFrontend
from tests.support.harness import ServiceHarness
from tests.support.held import Held
from tests.support.seen import epochs
from tests.support.two_layers import CONFIG, LAYERS, Load, answers, tokens
from tests.support.waiting import PATIENCE_S, until, until_async

HERE = "this-node"


@pytest.mark.parametrize("nodes", [(HERE, ""), ("", "")], ids=["memory-and-tcp", "tcp"])
def test_hosts_come_and_go_under_load_from_all_frontends(nodes: tuple[str, str], tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service, ExitStack() as stack:
        service.call(service.open_control())
        followers = [stack.enter_context(ThreadedFrontend(service.control_target, node, name=f"f{node}")) for node in nodes]
        loads = [stack.enter_context(Load(target, 2)) for target in (service.target, *(follower.target for follower in followers))]
        for wanted, epoch in ((6, 2), (3, 3), (2, 4)):
            for load in loads:
                load.goes_on(10)
            assert service.call(service.controller.scale(wanted)).epoch == epoch
            assert epochs(service) == [epoch] * 3
            assert {member.oldest_epoch for member in service.frontends.members()} == {epoch}
            assert len(service.hosts) == wanted
        service.call(service.controller.drain("host-0"))
        for load in loads:
            load.goes_on(10)
        with Client(followers[0].target) as client:
            until(lambda: [host.name for host in client.stats().hosts] == ["host-1"])


def test_a_host_that_comes_back_is_found_where_it_is_now(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        with ThreadedFrontend(service.control_target) as follower, Load(follower.target, 2) as load:
            for host in service.hosts:
                load.goes_on(5)
                service.call(until_async(lambda: service.frontends.members()[1].is_ready))
                host.stop()
                service.call(until_async(lambda: not service.frontends.members()[1].is_ready))
                host.start()
            service.call(until_async(lambda: service.frontends.members()[1].is_ready))
            load.goes_on(10)


def test_what_hosts_say_of_themselves_reaches_frontends_elsewhere(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        with ThreadedFrontend(service.control_target) as follower, Client(follower.target) as client:
            for host in service.hosts:
                host.host.info = replace(host.host.info, weights_bytes=99)
            service.introduce()
            service.call(until_async(lambda: {host.weights_bytes for host in client.stats().hosts} == {99}))


def test_what_is_said_of_the_next_incarnation_of_a_host_is_not_said_of_this_one(tmp_path: Path) -> None:
    """It is announced while the connection to the one before is open."""
    with ServiceHarness(CONFIG, "shm", tmp_path) as service, Client(service.target) as client:
        first, second = (host.host for host in service.hosts[:2])
        first.info = replace(first.info, endpoints=("tcp://127.0.0.1:1",), since_epoch=2)
        second.info = replace(second.info, weights_bytes=99)
        service.introduce()
        until(lambda: client.stats().hosts[1].weights_bytes == 99)
        client.forward(tokens(0))


def test_without_its_controller_a_frontend_serves_on_and_catches_up_later(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        with ThreadedFrontend(service.control_target) as follower:
            key = follower.service.public_key
            with Load(follower.target, 2) as load:
                service.call(service.close_control())
                service.call(until_async(lambda: epochs(service) == [1]))
                load.goes_on(20)
                assert service.followers == {key}
            service.call(service.controller.scale(4))
            service.call(service.controller.scale(3))
            with pytest.raises(ExpertUnavailable, match=r"host-.: this host holds no experts .* at epoch 1"):
                follower.call(follower.service.frontend.forward(0, LayerRequest(tokens(0), deadline=time.monotonic() + 3)))
            service.call(service.reopen_control())
            service.call(until_async(lambda: epochs(service) == [3, 3]))
            assert service.followers == {key}
            service.call(until_async(lambda: service.frontends.members()[1].oldest_epoch == 3))
            answers(follower.target)
            with Client(follower.target) as client:
                until(lambda: len(client.stats().hosts) == 3)
            service.call(service.controller.scale(2))
            assert epochs(service) == [4, 4]
            answers(follower.target)
        assert service.followers == frozenset()


def test_batches_of_an_earlier_release_end_although_a_controller_dies_before_it_has_published_the_next(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service, ThreadPoolExecutor() as pool:
        service.call(service.open_control())
        with ThreadedFrontend(service.control_target) as follower, Client(follower.target) as client:
            held, before, answer = Held(service.hosts[0]), service.controller.state, pool.submit(client.forward, tokens(0))
            assert held.begun.acquire(timeout=PATIENCE_S)
            release = replace(before.release, placement=replace(before.release.placement, epoch=2))
            service.call(service.close_control())
            service.call(service.cluster.hosts.take(release, before.assignments))
            service.program.remember(state=replace(before, release=release, last_epoch=2))
            service.call(service.reopen_control())
            assert [host.host.holdings.store.epochs for host in service.hosts] == [[1, 2]] * 2
            keeping = pool.submit(service.call, service.program.keep())
            service.call(until_async(lambda: any((one.epoch, one.oldest_epoch) == (2, 1) for one in service.frontends.members())))
            assert not keeping.done()
            held.let_go()
            assert_close(answer.result().hidden_states, MoELayer(**LAYERS[0])(tokens(0)))
            assert keeping.result() is None and [host.host.holdings.store.epochs for host in service.hosts] == [[2]] * 2


def test_one_that_joins_in_the_middle_of_a_roll_out_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service, ThreadPoolExecutor() as pool, ExitStack() as stack:
        service.call(service.open_control())
        early = stack.enter_context(ThreadedFrontend(service.control_target))
        gate = _Gate(service, monkeypatch)
        scaling = pool.submit(service.call, service.controller.scale(4))
        service.call(until_async(lambda: gate.waits))
        late = stack.enter_context(ThreadedFrontend(service.control_target, name="late"))
        answers(late.target)
        service.call(until_async(lambda: [member.tried_epoch for member in service.frontends.members()] == [0, 2, 2]))
        assert not scaling.done() and epochs(service) == [1, 1, 1]
        gate.open(service)
        assert scaling.result(timeout=30).epoch == 2
        assert epochs(service) == [2, 2, 2]
        for follower in (early, late):
            answers(follower.target)


class _Gate:
    """Holds a roll-out up where the frontend of the harness tries it."""

    def __init__(self, service: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
        import asyncio

        self.waits, self._may = False, asyncio.Event()
        try_out = service.frontend.try_out

        async def held(*arguments: Any) -> None:
            self.waits = True
            await self._may.wait()
            await try_out(*arguments)

        monkeypatch.setattr(service.frontend, "try_out", held)

    def open(self, service: ServiceHarness) -> None:
        service._thread.soon(self._may.set)


def test_one_that_cannot_use_it_stops_the_roll_out_with_its_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service, ExitStack() as stack:
        service.call(service.open_control())
        good, bad = (stack.enter_context(ThreadedFrontend(service.control_target, name=name)) for name in ("good", "bad"))
        loads = [stack.enter_context(Load(follower.target, 1)) for follower in (good, bad)]

        def unreadable(_: object) -> None:
            raise CheckpointError("/model/gate.safetensors does not exist")

        with monkeypatch.context() as patch:
            patch.setattr(bad.service._followed.follower, "_sources", unreadable)
            with pytest.raises(ConfigError, match=r"frontend bad cannot use epoch 2: /model/gate\.safetensors does not exist"):
                service.call(service.controller.scale(4))
        assert epochs(service) == [1, 1, 1] and len(service.hosts) == 2
        for load in loads:
            load.goes_on(5)
        with Client(good.target) as client:
            service.call(until_async(lambda: len(client.stats().hosts) == 2))
        assert service.call(service.controller.scale(4)).epoch == 3
        assert epochs(service) == [3, 3, 3]


def test_a_host_that_hangs_is_left_by_all(tmp_path: Path) -> None:
    """A batch that waits for it begins again on the others, after server.drain_timeout_s, at a frontend elsewhere as in this process."""
    config = {**CONFIG, "placement": {"num_hosts": 3}, "server": {"port": 0, "drain_timeout_s": 0.2}}
    with ServiceHarness(config, "shm", tmp_path) as service, ThreadPoolExecutor() as pool:
        service.call(service.open_control())
        with ThreadedFrontend(service.control_target) as follower, Client(follower.target) as client:
            held = Held(service.hosts[1], 0)
            waiting = pool.submit(client.forward, tokens(0), 0)
            assert held.begun.acquire(timeout=30)
            drained = pool.submit(service.call, service.controller.drain("host-1"))
            assert_close(waiting.result(timeout=30).hidden_states, MoELayer(**LAYERS[0])(tokens(0)))
            held.leave.release(10)
            assert drained.result(timeout=30).placement.hosts == (0, 2)
            service.call(until_async(lambda: service.frontends.members()[1].oldest_epoch == 2))


def test_one_that_does_not_move_over_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeserve.control.timing.GRACE_S", 0.1)
    with ServiceHarness({**CONFIG, "server": {"port": 0, "drain_timeout_s": 0.1}}, "shm", tmp_path) as service:
        service.call(service.open_control())
        with ThreadedFrontend(service.control_target) as follower:
            hear = service.frontends.hear

            def hear_some(member: FollowingFrontend, said: Report) -> None:
                if said.epoch == 1 or said.name == "serve":
                    hear(member, said)

            monkeypatch.setattr(service.frontends, "hear", hear_some)
            assert service.call(service.controller.scale(3)).epoch == 2
            service.call(until_async(lambda: epochs(service) == [2, 1]))  # as far as anybody knows
            answers(follower.target)


def test_who_may_follow(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        for token in ("wrong", ""):
            with pytest.raises(Unauthenticated, match="the frontend token is missing or wrong"):
                ThreadedFrontend(service.control_target, token=token).__enter__()
        with pytest.raises(PermissionDenied, match="this service does not accept frontends of other users"):
            ThreadedFrontend(service.target).__enter__()
        assert epochs(service) == [1] and service.followers == frozenset()


def test_whom_hosts_let_in(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        info = service.hosts[0].info
        endpoint = next(endpoint for endpoint in info.endpoints if endpoint.startswith("tcp://"))

        async def knock(keys: KeyPair) -> None:
            await (await connect(endpoint, keys=FrontendKeys(keys, info.public_key))).close()

        with ThreadedFrontend(service.control_target) as follower:
            handed_out = follower.service._followed.follower._keys
            service.call(knock(handed_out))
            with pytest.raises(ChannelClosed, match="does not know this frontend's key"):
                service.call(knock(KeyPair.generate()))
        with pytest.raises(ChannelClosed, match="does not know this frontend's key"):
            service.call(knock(handed_out))


def test_the_stream_is_encrypted_and_certificates_are_asked_for(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    (cert, key), (own_cert, own_key) = authority.sign("controller"), authority.sign("frontend")
    server = {"port": 0, "tls_cert": cert, "tls_key": key, "client_ca": authority.certificate}
    with ServiceHarness({**CONFIG, "server": server}, "shm", tmp_path) as service:
        service.call(service.open_control())
        tls = TLS(ca=authority.certificate, cert=own_cert, key=own_key)
        with ThreadedFrontend(service.control_target, tls=tls) as follower:
            answers(follower.target)
        for refused in (None, TLS(ca=authority.certificate)):
            with pytest.raises(ServiceUnreachable, match=r"no controller was reached: .* is unavailable"):
                ThreadedFrontend(service.control_target, tls=refused, timeout_s=0).__enter__()


def test_a_controller_that_drains_is_not_held_up(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        with ThreadedFrontend(service.control_target) as follower:
            service.call(service.control_server.drain(3600))
            answers(follower.target)


def test_another_configuration_needs_a_new_start(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        with ThreadedFrontend(service.control_target) as follower:
            service.call(service.close_control())
            service.config = service.config.model_copy(update={"batching": BatchingConfig(micro_batches=2)})
            service.call(service.reopen_control())
            service.call(until_async(lambda: follower.broken))
            assert "the controller has another configuration now" in str(follower.broken)
            answers(follower.target)


def test_another_deployment_needs_a_new_start(tmp_path: Path) -> None:
    """Its first epoch is not that of the one before, although both are number 1: experts may be elsewhere."""
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        service.call(service.open_control())
        with ThreadedFrontend(service.control_target) as follower:
            service.call(service.close_control())
            service.call(service.reopen_control("another"))
            service.call(until_async(lambda: follower.broken))
            assert "the controller serves another deployment now" in str(follower.broken)
