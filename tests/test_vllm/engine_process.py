"""A process of its own for one vLLM engine: `python engine_process.py REQUEST.json ANSWER.json`.

The request has `engine` (arguments of `vllm.LLM`), `prompts` (lists of token ids) and `adapters` (a folder or null for
each prompt). The answer has, for each prompt, the log-probabilities of its tokens after the first; with adapters (whose
prompts vLLM gives none for) those of the whole vocabulary after it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    request = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(**request["engine"])
    folders = sorted({folder for folder in request["adapters"] if folder})
    adapters = [folder and LoRARequest(folder, folders.index(folder) + 1, folder) for folder in request["adapters"]]
    wanted = {"logprobs": engine.llm_engine.model_config.get_vocab_size()} if folders else {"prompt_logprobs": 0}
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in request["prompts"]],
        SamplingParams(max_tokens=1, temperature=0, **wanted),
        lora_request=adapters if folders else None,
    )
    if folders:
        positions = [output.outputs[0].logprobs[0] for output in outputs]
        answer = [[position[token].logprob for token in sorted(position)] for position in positions]
    else:
        answer = [
            [position[token].logprob for token, position in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
            for ids, output in zip(request["prompts"], outputs, strict=True)
        ]
    Path(sys.argv[2]).write_text(json.dumps(answer))
    del engine  # stops its processes
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # vLLM's threads of several ranks now and then abort the interpreter while it ends


if __name__ == "__main__":
    main()
