"""Reading a configuration: what is taken, and the one sentence that says what is wrong."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moeserve import ConfigError, GatingConfig, ServiceConfig, load_config
from moeserve.config import FrontendConfig, ServedModel

LAYER = {"hidden_size": 8, "intermediate_size": 16, "num_experts": 4}


def refusal(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def written(folder: Path, text: str) -> Path:
    path = folder / "service.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("mapping", "parts"),
    [
        ({"servr": {}}, ["servr is not a key", "allowed here: server, model, layers"]),
        ({"server": {"prt": 1}}, ["server.prt is not a key", "got 1", "host, port"]),
        ({"layers": [{**LAYER, "hiden_size": 8}]}, ["layers.0.hiden_size is not a key", "got 8", "hidden_size"]),
        ({"layers": [LAYER, {**LAYER, "gating": {"topk": 2}}]}, ["layers.1.gating.topk is not a key", "got 2", "top_k, scoring_func"]),
        ({"balancing": {"min_gain": 1.5}, "layers": [LAYER]}, ["balancing.min_gain", "1.5", "less than or equal to 1"]),
        ({"balancing": {"interval_s": 0}, "layers": [LAYER]}, ["balancing.interval_s", "greater than 0"]),
        *(
            (
                {"model": {"deterministic": True}, "layers": [LAYER], "balancing": balancing},
                ["model.deterministic is true, but balancing has"],
            )
            for balancing in ({"enabled": True}, {"extra_copies": 0.5}, {"min_copies": 2})
        ),
        ({"placement": {"strategie": "x"}}, ["placement.strategie is not a key", "num_hosts", "strategy"]),
    ],
)
def test_an_unknown_key_is_named_with_the_keys_that_exist(mapping: dict[str, Any], parts: list[str]) -> None:
    sentence = refusal({"layers": [LAYER], **mapping})
    assert all(part in sentence for part in parts), sentence


@pytest.mark.parametrize(
    ("table", "key", "value", "allowed"),
    [
        ("server", "port", "50051", "integer"),
        ("server", "port", 1.0, "integer"),
        ("server", "port", True, "integer"),
        ("server", "insecure", 1, "boolean"),
        ("server", "host", 127, "string"),
        ("server", "tls_cert", 3, "path"),
        ("server", "tls_cert", "", "path"),
        ("model", "checkpoint", "", "path"),
        ("model", "layers", 3, "list"),
        ("batching", "max_batch_wait_ms", "1", "number"),
        ("resilience", "request_timeout_s", True, "number"),
        ("ray", "num_cpus", "two", "integer"),
        # the right type, but not one of the values
        ("server", "port", 70000, "less than or equal to 65535"),
        ("server", "metrics_port", -1, "greater than or equal to 0"),
        ("server", "max_queued_tokens", 0, "greater than or equal to 1"),
        ("model", "dtype", "float8", "'float32', 'float16' or 'bfloat16'"),
        ("model", "layers", [], "at least 1 item"),
        ("placement", "num_hosts", 0, "greater than or equal to 1"),
        ("placement", "strategy", "scattered", "'contiguous' or 'round_robin'"),
        ("resilience", "on_expert_failure", "ignore", "'retry', 'renormalize', 'residual' or 'fail'"),
        ("resilience", "request_timeout_s", 0, "greater than 0"),
        ("resilience", "request_timeout_s", float("inf"), "finite"),
        ("placement", "cpus_per_host", float("inf"), "finite"),
        ("observability", "expert_detail", "some", "'off', 'top' or 'full'"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(table: str, key: str, value: object, allowed: str) -> None:
    sentence = refusal({"layers": [LAYER], table: {key: value}})
    assert f"{table}.{key}: " in sentence
    assert repr(value) in sentence
    assert allowed in sentence


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("top_k", "2", "integer"),
        ("top_k", 0, "greater than or equal to 1"),
        ("drop_tokens", "yes", "boolean"),
        ("capacity_factor", 0, "greater than 0"),
        ("capacity_factor", float("nan"), "finite"),
        ("min_capacity", -1, "greater than or equal to 0"),
        ("renormalize", "sometimes", "'none', 'pre_drop' or 'post_drop'"),
        ("drop_policy", "worst", "'position', 'choice_major', 'probs' or 'random'"),
        ("scoring_func", "tanh", "'softmax'"),
    ],
)
def test_gating_is_as_strict_as_the_other_tables(key: str, value: object, allowed: str) -> None:
    sentence = refusal({"layers": [{**LAYER, "gating": {key: value}}]})
    assert f"layers.0.gating.{key}: " in sentence
    assert repr(value) in sentence
    assert allowed in sentence


@pytest.mark.parametrize("size", ["hidden_size", "intermediate_size", "num_experts"])
def test_a_layer_without_a_checkpoint_needs_every_size(size: str) -> None:
    layer = {key: value for key, value in LAYER.items() if key != size}
    assert f"layers.1.{size} is required" in refusal({"layers": [LAYER, layer]})
    assert f"layers.0.{size}: " in refusal({"layers": [{**LAYER, size: 0}]})


def test_impossible_combinations_are_refused() -> None:
    assert "nothing to serve" in refusal({})
    assert "server.tls_cert and server.tls_key must be given together" in refusal({"layers": [LAYER], "server": {"tls_cert": "a"}})
    assert "server.tls_cert and server.tls_key must be given together" in refusal({"layers": [LAYER], "server": {"tls_key": "a"}})
    assert "server.client_ca needs server.tls_cert" in refusal({"layers": [LAYER], "server": {"client_ca": "a"}})
    same = {"layers": [LAYER], "server": {"port": 9464}}
    assert "server.port and server.metrics_port are both 9464; each needs a port of its own" in refusal(same)
    same = {"layers": [LAYER], "server": {"metrics_port": 0, "port": 0, "health_port": 0}}
    assert load_config(same).server.health_port == 0
    assert "model.layers needs model.checkpoint" in refusal({"layers": [LAYER], "model": {"layers": [0]}})
    assert "model.name: String should have at least 1 character (got '')" in refusal({"layers": [LAYER], "model": {"name": ""}})
    assert "layers.0.name: String should have at least 1 character (got '')" in refusal({"layers": [{**LAYER, "name": ""}]})
    assert "layer names must differ, got ['a', 'a']" in refusal({"layers": [{**LAYER, "name": "a"}, {**LAYER, "name": "a"}]})
    assert "layer names must differ" in refusal({"layers": [LAYER, {**LAYER, "name": "layers.0"}]})
    spills = {"layers": [LAYER], "store": {"spill": "disk"}}
    assert "store.spill is 'disk': it needs placement.memory_per_host_bytes" in refusal(spills)
    on_gpus = {"memory_per_host_bytes": 10**6, "gpus_per_host": 0.5}
    assert "store.spill is 'disk' and placement.gpus_per_host is 0.5; allowed: 0" in refusal({**spills, "placement": on_gpus})
    assert "store.spill" in refusal({**spills, "store": {"spill": "host"}})


@pytest.mark.parametrize("layer", [1.5, True, None])
def test_layers_of_a_checkpoint_are_named_or_numbered(layer: object) -> None:
    assert f"model.layers must contain positions or names of MoE layers (got {layer!r})" in refusal(
        {"model": {"checkpoint": "x", "layers": [0, "model.layers.1.mlp", layer]}}
    )


def test_several_mistakes_are_counted() -> None:
    assert "; 2 more" in refusal({"layers": [LAYER], "server": {"port": "a", "host": 1, "insecure": "b"}})


def test_defaults_are_local_dropless_and_modest() -> None:
    config = load_config({"layers": [LAYER]})
    assert (config.server.host, config.server.port, config.server.metrics_port) == ("127.0.0.1", 50051, 9464)
    assert (config.placement.num_hosts, config.placement.gpus_per_host) == (1, 0)
    assert config.resilience.on_expert_failure == "retry"
    assert config.layers[0].gating == GatingConfig()
    assert config.layers[0].gating.capacity_factor is None


def test_a_mapping_is_left_as_it_was() -> None:
    source = {"server": {"port": 1}, "layers": [LAYER]}
    assert load_config(source, {"server": {"port": 2}}).server.port == 2
    assert source == {"server": {"port": 1}, "layers": [LAYER]}


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        [server]
        port = 1
        host = "127.0.0.2"
        [[layers]]
        hidden_size = 8
        intermediate_size = 16
        num_experts = 4
        """,
    )
    config = load_config(path, {"server": {"port": 0}, "placement": {"num_hosts": 2}})
    assert (config.server.port, config.server.host, config.placement.num_hosts) == (0, "127.0.0.2", 2)
    assert "server.port: " in refusal(path, {"server": {"port": "any"}})


def test_an_override_of_what_is_no_table_is_refused() -> None:
    assert "server: " in refusal({"layers": [LAYER], "server": 5}, {"server": {"port": 1}})


def test_paths_in_a_file_count_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/someone")
    path = written(
        tmp_path,
        """
        [model]
        checkpoint = "../models/mixtral"
        [server]
        tls_cert = "tls/cert.pem"
        tls_key = "/etc/key.pem"
        client_ca = "~/ca.pem"
        auth_token_file = "token"
        """,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for source in (path, str(path), os.path.relpath(path)):
        config = load_config(source)
        assert config.model.checkpoint == tmp_path / "../models/mixtral"
        assert config.server.tls_cert == tmp_path / "tls/cert.pem"
        assert config.server.tls_key == Path("/etc/key.pem")
        assert config.server.client_ca == Path("/home/of/someone/ca.pem")
        assert config.server.auth_token_file == tmp_path / "token"


def test_a_folder_is_a_checkpoint(tmp_path: Path) -> None:
    config = load_config(str(tmp_path), {"model": {"dtype": "bfloat16"}})
    assert (config.model.checkpoint, config.model.dtype) == (tmp_path, "bfloat16")


def test_one_layers_table_speaks_of_every_layer(tmp_path: Path) -> None:
    path = written(tmp_path, '[model]\ncheckpoint = "m"\n[layers.gating]\ncapacity_factor = 1.25\n')
    (layer,) = load_config(path).layers
    assert layer.name is None
    assert layer.gating == GatingConfig(capacity_factor=1.25)


def test_errors_of_a_file_begin_with_its_path(tmp_path: Path) -> None:
    assert refusal(written(tmp_path, "[server]\nprt = 1")).startswith(f"{tmp_path}/service.toml: server.prt")


def test_a_file_that_is_missing_or_not_toml_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path}/none.toml does not exist" in refusal(tmp_path / "none.toml")
    assert refusal("~nobody-of-that-name/x.toml").startswith("~nobody-of-that-name/x.toml does not exist")
    assert "is not a readable TOML file: File name too long" in refusal(tmp_path / ("a" * 300))
    assert "is not a readable TOML file" in refusal(written(tmp_path, "[server\nport = 1"))
    assert "model.checkpoint: Input should be a path (got '')" in refusal(written(tmp_path, "[model]\ncheckpoint = ''"))
    assert refusal("") == "the source is empty: give a TOML file or a checkpoint folder"
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00")
    assert "is not a readable TOML file" in refusal(tmp_path / "weights.bin")


def test_gpus_of_a_host_are_a_fraction_of_one_or_whole() -> None:
    layer = {"hidden_size": 4, "intermediate_size": 4, "num_experts": 2}
    for gpus in (0.0, 0.25, 1.0, 2.0):
        load_config({"layers": [layer], "placement": {"gpus_per_host": gpus}})
    with pytest.raises(ConfigError, match=r"gpus_per_host is 1\.5; allowed: a fraction of one GPU, or whole GPUs"):
        load_config({"layers": [layer], "placement": {"gpus_per_host": 1.5}})


def test_the_home_of_a_user_that_does_not_exist_is_a_name_like_any_other(tmp_path: Path) -> None:
    source = written(tmp_path, '[model]\ncheckpoint = "~nobody-of-that-name/x"\n')
    assert load_config(source).model.checkpoint == tmp_path / "~nobody-of-that-name/x"


def test_a_working_directory_that_is_gone_is_missed_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path, "[[layers]]\nhidden_size = 8\nintermediate_size = 8\nnum_experts = 2\n")
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert load_config(source).layers[0].hidden_size == load_config({"layers": [LAYER]}).layers[0].hidden_size == 8
    overrides = {"placement": {"num_hosts": 3}, "server": {"admin_token_file": tmp_path / "token"}}
    assert load_config(source, overrides).placement.num_hosts == 3
    for sentence in (refusal("."), refusal(source, {"model": {"checkpoint": "model"}})):
        assert sentence.startswith("the working directory is gone")


def test_relative_paths_of_overrides_count_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = {"server": {"admin_token_file": Path("token")}, "model": {"checkpoint": "model"}}
    config = load_config({}, overrides)
    assert config.server.admin_token_file == tmp_path / "token"
    assert config.model.checkpoint == tmp_path / "model"


def test_every_relative_path_in_a_file_counts_from_its_folder(tmp_path: Path) -> None:
    tables = {name: table for name, table in ServiceConfig.model_json_schema()["properties"].items() if name != "layers"}
    described = ServiceConfig.model_json_schema()["$defs"]
    keys = {name: paths_in(described[table["$ref"].rpartition("/")[2]]) for name, table in tables.items() if "$ref" in table}
    assert keys["model"] == ["checkpoint"] and len(keys["server"]) >= 5
    text = "".join(f"[{name}]\n" + "".join(f'{key} = "some/{key}"\n' for key in paths) for name, paths in keys.items())
    config = load_config(written(tmp_path, text))
    read = {name: [getattr(getattr(config, name), key) for key in paths] for name, paths in keys.items()}
    assert read == {name: [tmp_path / "some" / key for key in paths] for name, paths in keys.items()}


def paths_in(table: dict[str, Any]) -> list[str]:
    return [key for key, value in table["properties"].items() if "'format': 'path'" in str(value)]


def test_a_host_is_told_no_more_than_it_needs() -> None:
    config = load_config({"layers": [LAYER], "model": {"dtype": "bfloat16"}, "server": {"port": 1}, "ray": {"address": "10.0.0.1:1"}})
    served = config.only(ServedModel)
    assert served.model_dump(exclude_unset=True) == config.model_dump(include={"model", "layers"}, exclude_unset=True)
    assert config.only(FrontendConfig).placement == config.placement
    assert b"10.0.0.1" not in pickle.dumps(served) + pickle.dumps(config.only(FrontendConfig))
