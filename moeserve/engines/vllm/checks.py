"""What cannot work with remote experts is refused before vLLM starts."""

from __future__ import annotations

from typing import Any, Final

from moeserve.errors import ConfigError

_OPERATORS: Final = ("vllm::moe_forward", "vllm::moe_forward_shared")


def require_possible(vllm_config: Any, moe: Any) -> None:
    """Raises ConfigError with what to set."""
    if vllm_config.parallel_config.enable_eplb:
        raise ConfigError("vLLM's --enable-eplb cannot be used with moeserve, which balances experts itself: leave it out")
    if moe.pcp_size > 1:
        raise ConfigError(f"vLLM's --prefill-context-parallel-size is {moe.pcp_size}; with moeserve, 1 is allowed")
    _require_open_graphs(vllm_config.compilation_config)


def _require_open_graphs(compilation: Any) -> None:
    """A captured call would never be made again."""
    mode = compilation.cudagraph_mode
    if mode is None or mode.name == "NONE":
        return
    missing = [name for name in _OPERATORS if name not in (compilation.splitting_ops or ())]
    if mode.name != "PIECEWISE" or missing:
        splitting = ", ".join(f'"{name}"' for name in (*compilation._attention_ops, *_OPERATORS))
        raise ConfigError(
            f"CUDA graphs ({mode.name}) would capture the calls of moeserve. Run vLLM with --compilation-config "
            f'\'{{"cudagraph_mode": "PIECEWISE", "splitting_ops": [{splitting}]}}\', or with --enforce-eager'
        )
