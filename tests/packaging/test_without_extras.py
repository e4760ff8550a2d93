"""What `pip install moeserve` alone can do: everything that talks to a service, and a sentence for the rest."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.engine import FakeEngine, identity, spec
from tests.support.harness import ServiceHarness
from tests.support.servers import served
from tests.support.two_layers import CONFIG

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

HIDE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
"""

CALLS = """
import asyncio, torch, moeserve, moeserve.client, moeserve.engines.vllm
target, x = sys.argv[1], torch.ones(3, 8)
with moeserve.Client(target) as client:
    print(client.forward(x, topk_ids=torch.zeros(3, 1, dtype=torch.int64), topk_weights=torch.ones(3, 1)).hidden_states.equal(x))
    print(client.layers()[0].name)
async def ask():
    print((await moeserve.AsyncClient(target).forward(x)).hidden_states.equal(x))
asyncio.run(ask())
moeserve.engines.vllm.register()
print(all(hasattr(moeserve.client, name) for name in moeserve.client.__all__))
"""

CONNECT = """
import logging, sys
from moeserve.engines.vllm.connection import connect
from moeserve.engines.vllm.settings import Settings
logging.basicConfig(format="%(message)s", stream=sys.stdout)
logging.getLogger("vllm").setLevel(logging.INFO)
with connect(Settings(target=sys.argv[1])) as client: print(len(client.layers()))
try: connect(Settings(target=sys.argv[1], embedded=True)).close()
except Exception as error: print(error)
"""
#: modules of the extra `serve` that vLLM needs itself
OF_VLLM = {"prometheus_client", "pydantic", "pydantic_core", "safetensors", "yaml", "zmq"}


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=~ ]", requirement)[0].lower().replace("_", "-")


def left_out() -> set[str]:
    """Modules of the distributions that only the extras name."""
    extras = {distribution(each) for name in ("serve", "hf") for each in PROJECT["optional-dependencies"][name]}
    return {module for module, owners in packages_distributions().items() if {distribution(owner) for owner in owners} & extras}


def python(code: str, *arguments: str, hidden: set[str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDE.format(modules=hidden or left_out()) + code, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_what_is_installed_beside_an_engine_is_small() -> None:
    assert {distribution(each) for each in PROJECT["dependencies"]} == {
        *("grpcio", "grpcio-health-checking", "grpcio-status", "numpy", "protobuf", "torch", "wrapt"),
    }
    assert {"ray", "typer", "rich", "pydantic", "zmq", "transformers"} <= left_out()


def test_clients_and_engines_need_none_of_the_extras() -> None:
    with served(FakeEngine([(spec("mlp", 8, 2), identity)])) as (target, _, _):
        done = python(CALLS, target)
    assert done.stdout.split() == ["True", "mlp", "True", "True"], done.stderr


def test_vllm_calls_over_grpc_where_less_is_installed_than_a_frontend_needs(tmp_path: Path) -> None:
    with ServiceHarness(CONFIG, "shm", tmp_path) as service:
        small, beside_vllm = (python(CONNECT, service.target, hidden=left_out() - kept) for kept in (set(), OF_VLLM))
        where = f"experts of {service.target}: called "
    needs = "moeserve.embedded needs pydantic, which is not installed: pip install 'moeserve[serve]'"
    assert small.stdout.splitlines() == [f"{where}over gRPC ({needs})", str(len(CONFIG["layers"])), needs], small.stderr
    inside = f"{where}by a frontend in this process"
    assert beside_vllm.stdout.splitlines() == [inside, str(len(CONFIG["layers"])), inside], beside_vllm.stderr


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("moeserve.MoELayer", "moeserve.MoELayer needs pydantic, which is not installed: pip install 'moeserve[serve]'"),
        ("moeserve.load_model", "moeserve.load_model needs transformers, which is not installed: pip install 'moeserve[hf]'"),
    ],
)
def test_the_rest_names_the_extra_that_it_needs(statement: str, sentence: str) -> None:
    done = python(f"import moeserve\ntry: {statement}\nexcept moeserve.ConfigError as error: print(error)")
    assert done.stdout.strip() == sentence, done.stderr


def test_the_command_names_its_extra_in_one_line() -> None:
    done = python("import sys; sys.argv = ['moeserve', 'serve', 'somewhere']\nfrom moeserve.cli.app import entry\nentry()")
    assert done.returncode == 2
    assert done.stderr == "error: this command needs typer, which is not installed: pip install 'moeserve[serve]'\n"


def test_hosts_on_ray_name_the_extra(tmp_path: Path) -> None:
    """Where everything else of a service happens to be installed, as beside an engine."""
    code = "import moeserve\ntry: moeserve.serve(sys.argv[1])\nexcept moeserve.ConfigError as error: print(error)"
    (tmp_path / "service.toml").write_text("[[layers]]\nhidden_size = 8\nintermediate_size = 8\nnum_experts = 2\n")
    done = python(code, str(tmp_path / "service.toml"), hidden={"ray"})
    assert done.stdout.strip() == "cluster.kind = \"ray\" needs ray, which is not installed: pip install 'moeserve[serve]'", done.stderr
