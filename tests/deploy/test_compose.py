"""compose.yaml and compose.tls.yaml against the code: settings, ports, mounts, who may reach what; no container engine is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from moeserve import ConfigError, load_config
from moeserve.cli.verbs import app
from moeserve.config import ServerConfig
from moeserve.observe.page import StatusPage
from moeserve.server.security import check_exposure
from tests.deploy.containers import COMPOSE, SERVICE, filled
from tests.deploy.files import DEPLOY, dashboard, read_yaml
from tests.support.harness import ServiceHarness
from tests.support.waiting import until

TLS = read_yaml(DEPLOY / "compose.tls.yaml")["services"]["moeserve"]
IMAGE_ENV = {"MOESERVE_HOST": "0.0.0.0"}
PORT, METRICS_PORT = ServerConfig().port, ServerConfig().metrics_port


def settings(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `moeserve` makes of the command line and the environment, said by the real parser."""
    known = {str(option.envvar) for option in command().params if getattr(option, "envvar", None)}
    assert set(environment) <= known
    for name, value in environment.items():
        monkeypatch.setenv(name, filled(value))
    verb, *arguments = [filled(word) for word in SERVICE["command"]]
    assert verb == "serve"
    return {name: value for name, value in command().make_context(verb, arguments).params.items() if value is not None}


def command() -> Any:
    return typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]


def test_what_is_served_in_the_clear_stays_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    said = settings({**IMAGE_ENV, **SERVICE["environment"]}, monkeypatch)
    assert said == {"source": "/model", "host": "0.0.0.0", "insecure": True, "num_hosts": "2"}
    published = [port for service in COMPOSE["services"].values() for port in service["ports"]]
    assert published and all(port.startswith("127.0.0.1:") for port in published)


def test_other_machines_need_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    said = settings({**IMAGE_ENV, **SERVICE["environment"], **TLS["environment"]}, monkeypatch)
    server = {name: value for name, value in said.items() if name not in ("source", "num_hosts")}
    assert server == {
        "host": "0.0.0.0",
        "insecure": False,
        "tls_cert": Path("/tls/tls.crt"),
        "tls_key": Path("/tls/tls.key"),
        "auth_token_file": Path("/tls/token"),
        "admin_token_file": Path("/tls/admin-token"),
    }
    assert not _refused(server)
    assert _refused({**server, "auth_token_file": None})
    assert TLS["ports"] == [f"{PORT}:{PORT}", f"127.0.0.1:{METRICS_PORT}:{METRICS_PORT}"]


def _refused(server: dict[str, Any]) -> bool:
    config = load_config({"layers": [{"hidden_size": 8, "intermediate_size": 8, "num_experts": 2}], "server": server})
    try:
        check_exposure(config.server)
    except ConfigError:
        return True
    return False


def test_ports_are_those_of_the_code() -> None:
    assert SERVICE["ports"] == [f"127.0.0.1:{port}:{port}" for port in (PORT, METRICS_PORT)]
    scraped = read_yaml(DEPLOY / "prometheus" / "prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert scraped == [f"moeserve:{METRICS_PORT}"] and "moeserve" in COMPOSE["services"]
    (source,) = read_yaml(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and COMPOSE["services"]["prometheus"]["ports"] == ["127.0.0.1:9090:9090"]


def test_everything_that_is_mounted_is_there() -> None:
    inside: dict[str, Path] = {}
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            outside, target, *mode = filled(volume).split(":")
            if outside not in COMPOSE["volumes"]:
                assert mode == ["ro"] and (DEPLOY / outside).is_dir(), volume
                inside[target] = DEPLOY / outside
    assert (inside["/model"] / "config.json").exists()
    assert (inside["/etc/prometheus"] / "prometheus.yml").exists() and (inside["/etc/prometheus"] / "alerts.yml").exists()
    (provider,) = read_yaml(inside["/etc/grafana/provisioning"] / "dashboards" / "moeserve.yaml")["providers"]
    home = COMPOSE["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert str(Path(home).parent) == provider["options"]["path"]
    assert (inside[provider["options"]["path"]] / Path(home).name).exists()
    assert dashboard()["uid"] == "moeserve"


def test_the_service_can_write_nothing_but_its_folder() -> None:
    assert SERVICE["read_only"] is True and SERVICE["tmpfs"] == ["/tmp:mode=1777"]
    for name, service in COMPOSE["services"].items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > ServerConfig().drain_timeout_s


def test_the_probe_says_whether_every_expert_can_be_had(tmp_path: Path) -> None:
    kind, program, *arguments = SERVICE["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python") and str(METRICS_PORT) in arguments[-1]
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4}
    with ServiceHarness({"layers": [sizes, {**sizes, "zero_experts": 2}], "placement": {"num_hosts": 2}}, "local", tmp_path) as service:
        page = StatusPage("127.0.0.1", 0, service.metrics.registry, service.frontend.stats)

        def probe() -> int:
            code = arguments[-1].replace(str(METRICS_PORT), str(page.port))
            return subprocess.run([sys.executable, *arguments[:-1], code], timeout=30, capture_output=True, check=False).returncode

        assert probe() == 0
        service.hosts[1].stop()
        until(lambda: probe() == 1)
        service.hosts[1].start()
        page.stop()
        assert probe() == 1
