"""Loads a checkpoint as somebody would who has only the folder: in a new process, offline, from another directory.

`check_as_stranger` starts the process; `main` is what it runs.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_NEW_TOKENS = 8
_PROMPT = "The capital of France is"
_ERROR_LENGTH = 500  # characters of an error that are passed on


@dataclass(frozen=True)
class Impression:
    """The observations of a stranger's check."""

    model_class: str  # class that transformers chose
    tensors: int  # parameters and buffers that were checked
    generated: str  # continuation of a short prompt, or token ids where there is no tokenizer
    seconds: float  # time that loading took


def check_as_stranger(folder: Path) -> Impression:
    """Loads the checkpoint in a fresh offline process, checks every tensor and generates a few tokens.

    Raises:
        ValueError: with the reason why a stranger could not use the checkpoint.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The same installed packages as here, independent of the directory.
        "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path),
    }
    with tempfile.TemporaryDirectory() as elsewhere:
        report = Path(elsewhere) / "report.json"
        code = f"from {__name__} import main; main()"
        command = [sys.executable, "-c", code, str(folder.absolute()), str(report)]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        if not report.is_file():
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            raise ValueError(f"{folder} cannot be loaded in a fresh process: {last[0][:_ERROR_LENGTH]}")
        seen = json.loads(report.read_text(encoding="utf-8"))
    if "error" in seen:
        raise ValueError(f"{folder} cannot be used as it is: {seen['error']}")
    return Impression(**seen)


def main() -> None:
    """Checks the folder in `sys.argv[1]` and writes what was seen, or the error, to the file in `sys.argv[2]`."""
    folder, report = Path(sys.argv[1]), Path(sys.argv[2])
    seen: dict[str, Any]
    try:
        seen = asdict(look(folder))
    except Exception as error:  # the parent reports it, of any kind
        seen = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:_ERROR_LENGTH]}
    report.write_text(json.dumps(seen), encoding="utf-8")


def look(folder: Path) -> Impression:
    """Loads the checkpoint here, checks every tensor and generates a few tokens.

    Raises:
        Exception: any that loading raises; ValueError for tensors or logits that are wrong.
    """
    import time

    import torch

    from quad_modifiers.checkpoint.whole_model import load_whole_model

    start = time.perf_counter()
    model = load_whole_model(folder)
    seconds = time.perf_counter() - start
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds NaN or infinite values")
    return Impression(type(model).__name__, len(tensors), _generate(model, folder), seconds)


def _generate(model: Any, folder: Path) -> str:
    import torch
    from transformers import AutoTokenizer

    from quad_modifiers.tools.publishing.contents import has_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer(folder) else None
    if tokenizer is None:
        ids = torch.tensor([[0, 1, 2, 3]]) % model.config.vocab_size
    else:
        ids = tokenizer(_PROMPT, return_tensors="pt").input_ids
        if int(ids.max()) >= model.get_input_embeddings().weight.shape[0]:
            raise ValueError("the tokenizer knows more tokens than the model; it belongs to another model")
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the logits are NaN or infinite")
        # Sampling settings of generation_config.json do not matter here.
        settings = {"max_new_tokens": _NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    new = output[0, ids.shape[1] :]
    return str(new.tolist()) if tokenizer is None else str(tokenizer.decode(new))
