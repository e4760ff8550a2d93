"""Runs in vLLM's environment: one engine, which generates when it is told to. The first argument is JSON, as are all lines.

{"model": FOLDER, "moeserve": its settings or null} -> then "ready"; [sequences, new tokens] on stdin -> [seconds, tokens] on stdout
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

PROMPT_TOKENS = 16


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    import vllm  # noqa: PLC0415

    job = json.loads(sys.argv[1])
    engine = vllm.LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=256,
        max_num_batched_tokens=256,
        additional_config={} if job["moeserve"] is None else {"moeserve": job["moeserve"]},
    )
    print('"ready"', file=answers)
    for line in sys.stdin:
        sequences, new = json.loads(line)
        prompts: list[Any] = [
            {"prompt_token_ids": [3 + (7 * number + 5 * place) % 120 for place in range(PROMPT_TOKENS)]} for number in range(sequences)
        ]
        chosen = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        found = engine.generate(prompts, chosen, use_tqdm=False)
        took_s = time.perf_counter() - began
        print(json.dumps([took_s, [list(each.outputs[0].token_ids) for each in found]]), file=answers)


if __name__ == "__main__":
    main()
