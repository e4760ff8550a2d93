"""Runs in vLLM's environment: engines in this process, one after the other, as the JSON of the first argument says; prints JSON lines.

    [{"model": FOLDER, "prompts": [[token ids], ...], "new": 40, "options": {of vllm.LLM}}, ...]

Tokens, what the memory of the model holds, and which tensors it has read from disk; or the error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_batched_tokens": 256,
    "seed": 0,
}


def note_reads() -> list[str]:
    """The names of tensors, as they are read from safetensors files from now on."""
    from vllm.model_executor.model_loader import weight_utils

    read: list[str] = []
    opened = weight_utils.safe_open

    class Opened:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self._file = opened(*arguments, **named)

        def __enter__(self) -> Opened:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Any:
            read.append(name)
            return self._file.get_tensor(name)

    weight_utils.safe_open = Opened
    return read


def sizes(model: Any) -> dict[str, int]:
    """Bytes of each parameter; ranks in other processes are sent this function by its name."""
    return {name: each.nbytes for name, each in model.named_parameters()}


def run(job: dict[str, Any], read: list[str]) -> dict[str, Any]:
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    read.clear()
    engine = vllm.LLM(job["model"], **OPTIONS | job["options"])
    chosen = vllm.SamplingParams(temperature=0, max_tokens=job["new"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    for _ in range(job.get("warm", 0)):
        engine.generate(prompts, chosen, use_tqdm=False)
    began = time.perf_counter()
    answers = engine.generate(prompts, chosen, use_tqdm=False)
    took_s = time.perf_counter() - began
    of_ranks = engine.apply_model(sizes)
    assert all(each == of_ranks[0] for each in of_ranks)
    found = {
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "seconds": took_s,
        "parameters": of_ranks[0],
        "read": list(read),
    }
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


if __name__ == "__main__":
    reads = note_reads()
    for each in json.loads(sys.argv[1]):
        try:
            result = run(each, reads)
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        print("\nRESULT " + json.dumps(result), flush=True)
