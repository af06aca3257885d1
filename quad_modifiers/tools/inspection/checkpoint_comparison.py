"""`compare_checkpoints`: checkpoints side by side, by their files and against a common original."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from quad_modifiers.checkpoint.opened import Opened, open_checkpoint
from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions
from quad_modifiers.data import CalibrationSource
from quad_modifiers.data.windows import warn_of_length
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.output_folder import check_target, user_path
from quad_modifiers.passes.calibration_stream import work_on
from quad_modifiers.process_state import kept_apart
from quad_modifiers.recipe.document import parse_recipe
from quad_modifiers.records.evaluation_record import Evaluation, read_evaluation, task_scores
from quad_modifiers.records.inventory import read_inventory
from quad_modifiers.records.score_cells import perplexity_cells, score_cells
from quad_modifiers.records.widths import width_tags
from quad_modifiers.tools.inspection.compared import NUMBERS_NAME, Comparison, Entry, Score
from quad_modifiers.tools.inspection.evaluation_text import TextOptions
from quad_modifiers.tools.inspection.measure.loss import LossMeter, Reference
from quad_modifiers.tools.inspection.measure.results import BlockRow, LossRow
from quad_modifiers.tools.inspection.measure.stream import measure_blocks
from quad_modifiers.tools.inspection.model_report import write_report

logger = logging.getLogger(__name__)


@kept_apart()
def compare_checkpoints(
    checkpoints: Sequence[str | Path],
    output_dir: str | Path | None = None,
    *,
    baseline: str | Path | None = None,
    dataset: CalibrationSource = None,
    text_column: str = "text",
    eval_windows: int = 4,
    seq_length: int = 512,
    seed: int = 0,
    options: LoadingOptions = DEFAULTS,
) -> Comparison:
    """Compares checkpoint folders and, if asked, writes report.html, its charts as PNGs, and comparison.json.

    Without a baseline no model is loaded: recipe, format, sizes, and evaluation.json where there is one. With a
    baseline each checkpoint runs on a few windows beside it, one checkpoint in memory at a time.

    Args:
        checkpoints: at least two folders with checkpoints, QUAD or other.
        output_dir: folder for the report, new or empty; None writes nothing.
        baseline: folder or Hub id of the original that all were made of.
        dataset: text to run on, as `calibration_windows` takes it; by default the half of gensim's Wikipedia articles
            that never calibrates.
        text_column: column of the text in `dataset`.
        eval_windows: windows of text.
        seq_length: tokens in a window.
        seed: seed that chooses the windows.
        options: how baseline and checkpoints are loaded; its revision is that of the baseline.

    Raises:
        FileExistsError: if `output_dir` exists and is not empty.
        FileNotFoundError: if there is no such folder, or it is not a checkpoint.
        ValueError: for fewer than two checkpoints, one of them twice, or one that was not made of the baseline; for
            options of loading without a baseline, as nothing is loaded then.
    """
    if baseline is None and options != DEFAULTS:
        raise ValueError("without a baseline no model is loaded; give one, or omit how to load it")
    output = None if output_dir is None else user_path(output_dir)
    if output is not None:
        from quad_modifiers.tools.inspection import compare_report  # now: it needs matplotlib

        check_target(output)
    folders = _folders(checkpoints)
    entries = [_entry(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    found = Comparison(entries)
    if baseline is not None:
        text = TextOptions(dataset, text_column, 0, eval_windows, seq_length, seed)
        original = open_checkpoint(baseline, known_only=True, options=options)
        with work_on(options.device):
            found = _against(original, folders, entries, text)
    if output is not None:
        drawn = compare_report.charts(found)
        build = partial(compare_report.comparison_page, found)
        write_report(output, drawn, build, found, NUMBERS_NAME)
    return found


def _against(original: Opened, folders: list[Path], entries: list[Entry], text: TextOptions) -> Comparison:
    """Runs every checkpoint beside the original."""
    original.need_unquantized("the baseline")
    warn_of_length(original.config, text.seq_length)
    for folder in folders:
        _open_beside(original, folder).need_same_type(original)
    windows = text.windows(original.tokenizer(), True, original.config.vocab_size)
    decoder = Decoder(original.load(), original.architecture)
    reference = Reference.of(decoder, windows.measured)
    measured = []
    for folder, entry in zip(folders, entries, strict=True):
        loss, blocks = _measure(original, decoder, reference, folder, windows.measured)
        measured.append(replace(entry, loss=loss, blocks=blocks))
    return Comparison(measured, original.name, reference.perplexity, windows.settings)


def _open_beside(original: Opened, folder: Path) -> Opened:
    return open_checkpoint(folder, known_only=True, options=replace(original.options, revision=None))


def _folders(checkpoints: Sequence[str | Path]) -> list[Path]:
    folders = [Path(each).expanduser() for each in checkpoints]
    if len(folders) < 2:
        raise ValueError(f"a comparison needs at least two checkpoints, not {len(folders)}; one alone: quad inspect")
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
    resolved = [folder.resolve() for folder in folders]
    for folder, real in zip(folders, resolved, strict=True):
        if resolved.count(real) > 1:
            raise ValueError(f"{folder} is given more than once")
    return folders


def _names(folders: list[Path]) -> list[str]:
    """Returns the ends of the paths, each as long as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        length = next(n for n in range(1, len(own) + 1) if sum(each[-n:] == own[-n:] for each in parts) == 1)
        names.append("/".join(own[-length:]))
    return names


def _measure(
    original: Opened, first: Decoder, reference: Reference, folder: Path, windows: list[torch.Tensor]
) -> tuple[LossRow, list[BlockRow]]:
    logger.info("%s against %s", folder, original.name)
    opened = _open_beside(original, folder)
    decoder = Decoder(opened.load(), opened.architecture)
    try:
        blocks = measure_blocks(first, decoder, windows)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    meter = LossMeter(decoder, windows, "after", reference)
    return meter.row("all", "inputs and weights", "as stored"), blocks


def _entry(folder: Path, name: str) -> Entry:
    """Returns what the files say; not yet measured."""
    inventory, evaluation = read_inventory(folder), read_evaluation(folder)
    file = folder / "recipe.yaml"
    recipe = file.read_text(encoding="utf-8") if file.is_file() else None
    basis = (inventory.quad or {}).get("residual_basis") or {}
    return Entry(
        name,
        str(folder),
        inventory.format,
        None if inventory.format == "unquantized" else next(iter(width_tags(inventory)), None),
        [] if recipe is None else [entry.name for entry in parse_recipe(recipe).entries],
        basis.get("rank", 0),
        basis.get("basis"),
        inventory.bytes_of,
        [] if evaluation is None else list(_scores(evaluation)),
        recipe=recipe,
    )


def _scores(evaluation: Evaluation) -> Iterator[Score]:
    for one in evaluation.perplexity:
        what = f"{one.text}, windows of {one.window_length}, {one.tokens} tokens"
        yield Score(what, True, one.value, one.stderr, one.baseline, perplexity_cells(one)[-1])
    if evaluation.average is not None:
        mean = evaluation.average
        what = f"average {mean.metric} over tasks, {mean.items} items"
        yield Score(what, False, mean.value, mean.stderr, mean.baseline, score_cells(mean)[-1])
    for each in evaluation.comparisons:
        what = f"{each.task}, {each.metric}, {each.items} items"
        yield Score(what, "perplexity" in each.metric, each.value, each.stderr, each.baseline, score_cells(each)[-1])
    for score in () if evaluation.comparisons else task_scores(evaluation):
        what = f"{score.task}, {score.metric}"
        yield Score(what, "perplexity" in score.metric, score.value, score.stderr, score.baseline)
