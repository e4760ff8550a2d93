"""Tokens and certificates, with both clients."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeserve import errors
from moeserve.client import TLS, AsyncClient, Client
from tests.client.calls import Calls
from tests.support.certificates import Authority
from tests.support.engine import FakeEngine, X
from tests.support.servers import served


async def test_token_and_mutual_tls(tmp_path: Path, engine: FakeEngine, connect: Callable[..., Calls]) -> None:
    (tmp_path / "token").write_text("secret\n")
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    (cert, key), (client_cert, client_key), (their_cert, their_key) = ours.sign("server"), ours.sign("client"), theirs.sign("stranger")
    config = {"tls_cert": cert, "tls_key": key, "client_ca": ours.certificate, "auth_token_file": tmp_path / "token"}
    known = TLS(ca=ours.certificate, cert=client_cert, key=client_key)
    with served(engine, **config) as (target, _, _):
        assert torch.equal((await connect(target, token="secret", tls=known).forward(X)).hidden_states, X)
        for token in (None, "guess"):
            with pytest.raises(errors.Unauthenticated, match="bearer token is missing or wrong"):
                await connect(target, token=token, tls=known).forward(X)
        for tls in (None, True, TLS(ca=ours.certificate), TLS(ca=ours.certificate, cert=their_cert, key=their_key)):
            with pytest.raises(errors.ExpertUnavailable, match=f"{target} is unavailable"):
                await connect(target, token="secret", tls=tls, retry=False).forward(X)


def test_tls_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")
    (cert, key), (_, other_key) = ours.sign("one"), ours.sign("other")
    os.mkfifo(pipe := tmp_path / "pipe")
    for kind in (Client, AsyncClient):
        with pytest.raises(errors.ConfigError, match=f"TLS file {tmp_path / 'ca.pem'} cannot be read"):
            kind("127.0.0.1:1", tls=TLS(ca=tmp_path / "ca.pem"))
        with pytest.raises(errors.ConfigError, match=f"TLS file {pipe} cannot be read: It is a pipe, not a file"):
            kind("127.0.0.1:1", tls=TLS(ca=pipe))
        with pytest.raises(errors.ConfigError, match=f"TLS ca {key} is not a PEM certificate"):
            kind("127.0.0.1:1", tls=TLS(ca=key))
        with pytest.raises(errors.ConfigError, match=f"TLS cert {cert} and key {other_key} are not a pair"):
            kind("127.0.0.1:1", tls=TLS(ca=ours.certificate, cert=cert, key=other_key))
        with pytest.raises(errors.ConfigError, match="cert and key must be given together"):
            kind("127.0.0.1:1", tls=TLS(cert=tmp_path / "cert.pem"))
