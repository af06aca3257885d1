"""A process for vLLM engines, which reads requests from its standard input, a line of JSON each, until that ends.

A request has `engine` (arguments of `vllm.LLM`), `prompts` (lists of token ids), `adapters` (a folder or null for each
prompt) and `answer`, a file to write: for each prompt, the log-probabilities of its tokens after the first; with
adapters (whose prompts vLLM gives none for) those of the whole vocabulary after it. Where the engine fails, the file
holds its traceback, a string. Importing vLLM takes longer than a toy's engine, so one process makes many, one after the
other.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def _import_classes() -> None:
    """Registers the plugin's classes themselves: a process each looks into those that are registered by name."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.plugins import load_general_plugins

    from quad_modifiers.vllm_plugin import MODEL_CLASSES, models

    load_general_plugins()
    for name in MODEL_CLASSES:
        ModelRegistry.register_model(name, getattr(models, name))


def _answer(request: dict[str, Any]) -> list[list[float]]:
    from vllm import LLM

    engine = LLM(**request["engine"])
    try:
        return _log_probabilities(engine, request)
    finally:
        engine.llm_engine.engine_core.shutdown()  # ends the processes of the engine, if it has any


def _log_probabilities(engine: Any, request: dict[str, Any]) -> list[list[float]]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

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
        return [[position[token].logprob for token in sorted(position)] for position in positions]
    return [
        [position[token].logprob for token, position in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(request["prompts"], outputs, strict=True)
    ]


def main() -> None:
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        _import_classes()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: Any = _answer(request)
        except Exception:
            answer = traceback.format_exc()
        gc.collect()  # the next engine needs the memory
        unfinished = Path(request["answer"] + ".part")
        unfinished.write_text(json.dumps(answer))
        unfinished.rename(request["answer"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # vLLM's threads of several ranks now and then abort the interpreter while it ends


if __name__ == "__main__":
    main()
