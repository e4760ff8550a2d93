"""Errors of the service fail the requests of a step, not vLLM's engine, which an exception in its model would end.

A worker notes the error and finishes the step with zeros; the scheduler is told with the output of the step, ends every request that runs
with an error, and keeps nothing of what was computed.
"""

from __future__ import annotations

import copy
import logging
from types import ModuleType
from typing import Any, Final

import wrapt

log = logging.getLogger(__name__)

#: of the output of a step
_ATTRIBUTE: Final = "moeserve_error"


class _Failed:
    """Why the step that runs in this process cannot be finished; None = it can."""

    why: str | None = None


FAILED: Final = _Failed()


def can_fail_requests(vllm_config: Any, moe: Any) -> bool:
    """Whether the worker that calls is the one whose output the scheduler gets. With sequence parallel, others call too."""
    parallel = vllm_config.parallel_config
    is_one = parallel.pipeline_parallel_size == 1 and not moe.is_sequence_parallel
    return bool(is_one and parallel.distributed_executor_backend in ("mp", "uni"))


def adopt(module: ModuleType) -> None:
    """Both ends: the worker and the scheduler."""
    if hasattr(module, "Worker"):
        for name in ("execute_model", "sample_tokens"):
            wrapt.wrap_function_wrapper(module, f"Worker.{name}", _run)
    else:
        wrapt.wrap_function_wrapper(module, "Scheduler.update_from_output", _update)


def _run(wrapped: Any, worker: Any, arguments: Any, named: Any) -> Any:
    output = wrapped(*arguments, **named)
    if FAILED.why is None or output is None:  # a step may be finished by the next call
        return output
    why, FAILED.why = FAILED.why, None
    if not hasattr(output, "get_output"):
        return _failed(output, why)
    finish = output.get_output
    output.get_output = lambda: _failed(finish(), why)
    return output


def _failed(output: Any, why: str) -> Any:
    told = copy.copy(output)  # one without tokens may be shared
    setattr(told, _ATTRIBUTE, why)
    told.sampled_token_ids = [[] for _ in output.sampled_token_ids]
    told.pooler_output = None
    return told


def _update(wrapped: Any, scheduler: Any, arguments: Any, named: Any) -> Any:
    output = named["model_runner_output"] if "model_runner_output" in named else arguments[1]
    why = getattr(output, _ATTRIBUTE, None)
    if why is not None:
        running = [request.request_id for request in scheduler.running]
        log.error("%d requests fail: %s", len(running), why)
        for each in running:
            blocks = scheduler.kv_cache_manager.get_block_ids(each)
            scheduler.kv_cache_manager.evict_blocks({block for group in blocks for block in group})
        scheduler.grammar_compile_error_reqs.update(running)  # vLLM's own list of requests to end with an error
    return wrapped(*arguments, **named)
