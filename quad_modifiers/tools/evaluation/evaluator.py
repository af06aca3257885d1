"""Evaluates a model, and the original beside it, one after the other in one process."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions
from quad_modifiers.data.token_rows import check_vocabulary
from quad_modifiers.data.windows import warn_of_length
from quad_modifiers.process_state import kept_apart
from quad_modifiers.records.evaluation_record import Evaluation, PerplexityResult
from quad_modifiers.records.machine import machine_name, package_versions
from quad_modifiers.tools.evaluation import cache
from quad_modifiers.tools.evaluation.comparison import average, compare, ratio_interval
from quad_modifiers.tools.evaluation.harness import OFFLINE_TASKS, LoadedTask, load_tasks
from quad_modifiers.tools.evaluation.perplexity_text import WIKIPEDIA, WINDOW_LENGTH, PerplexityText, perplexity_text
from quad_modifiers.tools.evaluation.subject import Subject
from quad_modifiers.tools.evaluation.task_run import TaskRun, run_task
from quad_modifiers.tools.evaluation.vllm_engine import engine_perplexity, need_vllm, vllm_version
from quad_modifiers.tools.evaluation.window_perplexity import Perplexity, perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BACKENDS = ("transformers", "vllm")


@kept_apart()
def evaluate(
    model: "str | Path | PreTrainedModel",
    tasks: Sequence[str] = OFFLINE_TASKS,
    baseline: "str | Path | PreTrainedModel | None" = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    device: str | None = None,
    text: str | Path | None = WIKIPEDIA,
    window_length: int = WINDOW_LENGTH,
    windows: int | None = None,
    text_column: str = "text",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    fresh: bool = False,
    options: LoadingOptions = DEFAULTS,
    baseline_revision: str | None = None,
    backend: str = "transformers",
) -> Evaluation:
    """Evaluates a model on lm-eval's tasks and its perplexity on a text.

    Each finished part is kept on disk under the content of the model's files: after an interruption the same call
    resumes where it stopped, and a baseline is measured once. Parts of a model in memory are not kept.

    Args:
        model: folder of a QUAD, compressed-tensors or ordinary checkpoint, a Hub id, or a loaded model.
        tasks: names of tasks, groups or tags of lm-eval, and of the offline tasks, which are the default.
        baseline: the original model, to compare with; measured after `model` has left the memory.
        limit: items of each task and windows of the text, for a quick look.
        seed: seed of few-shot examples, the choice of windows and the bootstrap.
        batch_size: requests in one forward pass.
        device: "cpu", "cuda", ...; the GPU if there is one by default.
        text: text for the perplexity: a text or jsonl file, "wikipedia" for held-out articles; None for none.
        window_length: tokens of a window.
        windows: number of windows; by default all of a file, 40 of the articles.
        text_column: column of the text in a jsonl, csv or parquet file.
        tokenizer: tokenizer of models in memory, if it is not where their weights come from.
        fresh: True to measure again what was kept.
        options: how model and baseline are loaded; its revision is that of the model, and `device` counts alone.
        baseline_revision: branch, tag or commit of the baseline's Hub id.
        backend: "transformers", or "vllm" for lm-eval's own vLLM model; vLLM takes folders and Hub ids, finds its
            device itself, and decides how a compressed-tensors checkpoint is computed.

    Returns:
        The content of evaluation.json; `quad_modifiers.records.evaluation_record.write_evaluation` writes it.

    Raises:
        FileNotFoundError: if there is no such model or text file.
        ValueError: for an unknown task (with close names), no task and no text, a limit or batch size below 1, a
            negative seed, a text that is too short, a device that this machine does not have.
        RuntimeError: if the data of a task cannot be loaded.
        ModuleNotFoundError: if vLLM is asked for and missing.
    """
    if baseline_revision is not None and baseline is None:
        raise ValueError(f"the baseline's revision {baseline_revision!r} is given, but no baseline; omit it")
    if backend not in BACKENDS:
        raise ValueError(f"the backend must be {' or '.join(BACKENDS)}, not {backend!r}")
    if backend == "vllm":
        need_vllm()
    for name, number in (("limit", limit), ("batch_size", batch_size), ("windows", windows)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a sequence of names, not one string; write [{tasks!r}]")
    if not tasks and text is None:
        raise ValueError("there is nothing to measure: name a task, or a text for the perplexity")
    asked = [(model, options), (baseline, replace(options, revision=baseline_revision))]
    subjects = [
        Subject(each, tokenizer, batch_size, device, how, backend, seed) for each, how in asked if each is not None
    ]
    measured = None if text is None else perplexity_text(text, window_length, windows, limit, seed, text_column)
    if measured is not None:
        warn_of_length(subjects[0].config, window_length)
    token_windows = [None if measured is None else measured.windows(subject.tokenizer) for subject in subjects]
    for subject, cut in zip(subjects, token_windows, strict=True):
        if cut is not None:
            check_vocabulary(
                cut, subject.config.get_text_config().vocab_size, f"the text, tokenized for {subject.name},"
            )
    if measured is not None and baseline is not None and not torch.equal(token_windows[0], token_windows[1]):
        logger.warning("the tokenizers differ: the baseline's perplexity of a token means something else, left out")
        token_windows[1] = None
    loaded = load_tasks(tasks) if tasks else []
    halves = [
        _measure(subject, loaded, cut, limit, seed, fresh) for subject, cut in zip(subjects, token_windows, strict=True)
    ]
    ours, theirs = halves[0][0], halves[1][0] if len(halves) > 1 else None
    baselines = [None] * len(loaded) if theirs is None else theirs
    compared = [compare(task.name, run, other, seed) for task, run, other in zip(loaded, ours, baselines, strict=True)]
    return Evaluation(
        format_version=1,
        baseline=None if theirs is None else subjects[1].name,
        perplexity=_perplexities(measured, [of_text for _, of_text in halves], seed),
        results=_merged(run.results for run in ours),
        baseline_results=_merged(run.results for run in theirs or ()),
        tasks=list(tasks),
        comparisons=[each for each in compared if each is not None],
        average=average(ours, theirs, seed),
        n_shot=_merged(run.n_shot for run in ours),
        versions=_merged(run.versions for run in ours),
        limit=limit,
        seed=seed,
        packages={**package_versions(), **(vllm_version() if backend == "vllm" else {})},
        machine=machine_name(),
    )


def _measure(
    subject: Subject,
    tasks: Sequence[LoadedTask],
    windows: torch.Tensor | None,
    limit: int | None,
    seed: int,
    fresh: bool,
) -> tuple[list[TaskRun], Perplexity | None]:
    """Runs a model on all that is not kept and returns the results by task; it is out of memory afterwards."""
    identity = subject.identity
    surroundings = {"packages": package_versions(), "device": subject.device, "seed": seed}
    if subject.options.dtype != DEFAULTS.dtype:
        surroundings["dtype"] = subject.options.dtype

    def kept(what: str, question: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = None if identity is None else {"model": identity, **surroundings, **question}
        found = None if key is None or fresh else cache.read(key)
        if found is not None:
            logger.info("%s: %s was measured before", subject.source, what)
            return found
        logger.info("%s: %s", subject.source, what)
        found = measure()
        if key is not None:
            cache.keep(key, found)
        return found

    def run(task: LoadedTask) -> TaskRun:
        question = {"task": task.name, "items": task.items_digest(limit), "limit": limit}
        return TaskRun(**kept(task.name, question, lambda: asdict(run_task(subject.lm, task, limit, seed))))

    def measure_perplexity(of: torch.Tensor) -> Perplexity:
        measured_by = engine_perplexity if subject.backend == "vllm" else perplexity
        question = {"windows": sha256(of.numpy().tobytes()).hexdigest(), "length": of.shape[1]}
        found = kept("perplexity", question, lambda: asdict(measured_by(subject.lm.model, of)))
        return Perplexity(**{**found, "window_nll": tuple(found["window_nll"])})

    try:
        return [run(task) for task in tasks], None if windows is None else measure_perplexity(windows)
    finally:
        subject.release()


def _perplexities(
    text: PerplexityText | None, measured: Sequence[Perplexity | None], seed: int
) -> list[PerplexityResult]:
    ours, theirs = measured[0], measured[1] if len(measured) > 1 else None
    if text is None or ours is None:
        return []
    if not math.isfinite(ours.value):
        logger.warning("the perplexity on %s is infinite; it is left out", text.name)
        return []
    if theirs is not None and not math.isfinite(theirs.value):
        theirs = None
    found = PerplexityResult(
        text=text.name,
        window_length=text.length,
        tokens=ours.tokens,
        value=ours.value,
        stderr=None if math.isnan(ours.stderr) else ours.value * ours.stderr,
        baseline=None if theirs is None else theirs.value,
        ratio_interval=None if theirs is None else ratio_interval(ours.window_nll, theirs.window_nll, seed),
    )
    return [found]


def _merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}
