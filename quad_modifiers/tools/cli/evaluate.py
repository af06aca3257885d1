"""`quad eval`: lm-eval's tasks and perplexity, beside the original model."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quad_modifiers.tools.cli.options import (
    AsJson,
    BaselineRevision,
    CacheDir,
    Device,
    Dtype,
    LoadingDtype,
    Revision,
    TextColumn,
    TrustRemoteCode,
    expanded,
    loading,
)
from quad_modifiers.tools.console import log_on_stderr, print_json, print_table

if TYPE_CHECKING:
    from quad_modifiers.checkpoint.whole_model import LoadingOptions
    from quad_modifiers.records.evaluation_record import Evaluation


class Backend(StrEnum):
    """What can compute the model."""

    transformers = "transformers"
    vllm = "vllm"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="OUT", help="Folder of a checkpoint, or a Hub id.")],
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Folder or Hub id of the original, to compare with.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Tasks, groups or tags of lm-eval, and the offline tasks. By default the offline tasks.",
        ),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="The offline tasks, besides those of --tasks; they need no network.")
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many items of each task and windows of the text, for a quick look."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="JSON file for the results; by default evaluation.json in the checkpoint's folder.",
            callback=expanded,
        ),
    ] = None,
    perplexity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text or jsonl file to measure perplexity on; by default 40 windows of held-out Wikipedia articles.",
            callback=expanded,
        ),
    ] = None,
    text_column: TextColumn = "text",
    no_perplexity: Annotated[bool, typer.Option("--no-perplexity", help="Run the tasks only.")] = False,
    window_length: Annotated[int, typer.Option(min=2, help="Tokens of a window of the text.")] = 512,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows drawn from the text; by default all of a file.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests in one forward pass.")] = 16,
    revision: Revision = None,
    baseline_revision: BaselineRevision = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: LoadingDtype = Dtype.auto,
    device: Device = None,
    cache_dir: CacheDir = None,
    seed: Annotated[int, typer.Option(min=0, help="Of few-shot examples, windows and intervals.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what an earlier run measured.")] = False,
    backend: Annotated[
        Backend,
        typer.Option(help="What computes the model. vllm takes an environment that has it, and finds its own device."),
    ] = Backend.transformers,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that holds results which this run does not measure.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model and, with --baseline, what is left of the original's scores.

    The two run one after the other. Finished parts are kept: after an interruption the same command resumes where it
    stopped, and a baseline is measured once. Progress goes to stderr, the table to stdout.
    """
    from quad_modifiers.records.evaluation_record import write_evaluation
    from quad_modifiers.tools.evaluation.evaluator import evaluate as measure
    from quad_modifiers.tools.evaluation.perplexity_text import WIKIPEDIA

    if perplexity is not None and no_perplexity:
        raise ValueError("--perplexity names a text and --no-perplexity leaves it out; give one of the two")
    named = _tasks(tasks, offline)
    text: str | Path | None = None if no_perplexity else perplexity or WIKIPEDIA
    options = loading(revision, trust_remote_code, dtype, None, cache_dir)
    target = _target(model, output)
    if target is not None and not overwrite:
        original = None if baseline is None else _name(baseline, replace(options, revision=baseline_revision))
        _check_covered(target, named, limit, None if text is None else (text, window_length), original)
    with log_on_stderr():
        found = measure(
            model,
            named,
            baseline,
            limit=limit,
            seed=seed,
            batch_size=batch_size,
            device=device,
            text=text,
            window_length=window_length,
            windows=windows,
            text_column=text_column,
            fresh=fresh,
            options=options,
            baseline_revision=baseline_revision,
            backend=backend.value,
        )
    # First: if writing fails, the numbers are not lost.
    if as_json:
        print_json(found.model_dump(mode="json", exclude_defaults=True))
    else:
        _print(found)
    if target is not None:
        write_evaluation(found, target)
        typer.echo(f"written to {target}", err=as_json)


def _tasks(tasks: str | None, offline: bool) -> list[str]:
    """Returns what is to be measured: the named tasks, and the offline ones that are not among them."""
    from quad_modifiers.tools.evaluation.harness import OFFLINE_GROUP, OFFLINE_TASKS

    named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if (offline or tasks is None) and OFFLINE_GROUP not in named:
        named += [name for name in OFFLINE_TASKS if name not in named]
    return named


def _target(model: str, output: Path | None) -> Path | None:
    """Returns the file for the results, after a look whether it can be written; None for a Hub id without one."""
    from quad_modifiers.output_folder import check_parent
    from quad_modifiers.records.evaluation_record import EVALUATION_NAME

    folder = Path(model).expanduser()
    target = output or (folder / EVALUATION_NAME if folder.is_dir() else None)
    if target is None:
        return None
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; --output is the JSON file, such as {target / EVALUATION_NAME}")
    check_parent(target)
    return target


def _check_covered(
    target: Path, tasks: Sequence[str], limit: int | None, text: tuple[str | Path, int] | None, baseline: str | None
) -> None:
    """Refuses a run that would replace results which it does not measure."""
    from quad_modifiers.records.evaluation_record import check_replaceable
    from quad_modifiers.tools.evaluation.harness import OFFLINE_GROUP, OFFLINE_TASKS
    from quad_modifiers.tools.evaluation.perplexity_text import text_name

    covered = set(tasks)
    if OFFLINE_GROUP in covered or covered.issuperset(OFFLINE_TASKS):
        covered |= {OFFLINE_GROUP, *OFFLINE_TASKS}
    measured_text = None if text is None else (text_name(text[0]), text[1])
    check_replaceable(target, covered, limit, measured_text, baseline)


def _name(model: str, options: "LoadingOptions") -> str:
    """Returns the name under which a model's scores are kept."""
    from quad_modifiers.tools.evaluation.subject import Subject

    return Subject(model, options=options).name


def _print(found: "Evaluation") -> None:
    from quad_modifiers.records.evaluation_record import task_scores
    from quad_modifiers.records.score_cells import perplexity_cells, score_cells, with_error
    from quad_modifiers.tools.evaluation.task_run import ACCURACIES, WORD_PERPLEXITY

    title = None if found.baseline is None else f"baseline: {found.baseline}"
    average = [] if found.average is None else [found.average]
    if compared := [*found.comparisons, *average]:
        header = ("task", "metric", "items", "guessing", "score")
        against = ("baseline", "kept", "above guessing", "difference, 95 % interval", "")
        _print_columns(header, against, [(each.task, *score_cells(each)) for each in compared], title)
    main = {*ACCURACIES, WORD_PERPLEXITY}  # by which tasks are compared
    metrics = {task: {key.partition(",")[0] for key in results} for task, results in found.results.items()}
    others = [score for score in task_scores(found) if main.isdisjoint(metrics[score.task])]
    if others:
        rows = [(s.task, s.metric, with_error(s.value, s.stderr), with_error(s.baseline, None)) for s in others]
        _print_columns(("task", "metric", "score"), ("baseline",), rows, title)
    if found.perplexity:
        of_text, of_original = ("text", "window", "tokens", "perplexity"), ("baseline", "ratio, 95 % interval", "")
        _print_columns(of_text, of_original, map(perplexity_cells, found.perplexity), title)


def _print_columns(
    header: Sequence[str], against: Sequence[str], rows: Iterable[Sequence[str]], title: str | None
) -> None:
    """Prints a table; without a baseline, only the columns of `header`."""
    columns = [*header, *against] if title else header
    print_table(columns, [row[: len(columns)] for row in rows], title=title)
