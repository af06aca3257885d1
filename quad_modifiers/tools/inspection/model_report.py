"""`inspect_model`: from a model or checkpoint to a report that people choose rank and bits by."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions
from quad_modifiers.data import CalibrationSource
from quad_modifiers.output_folder import check_target, complete_or_absent, user_path
from quad_modifiers.process_state import kept_apart
from quad_modifiers.tools.inspection.evaluation_text import TextOptions
from quad_modifiers.tools.inspection.measure.grid_ratios import HEADER as GRID_RATIOS
from quad_modifiers.tools.inspection.measure.grid_ratios import mean_grid_ratios
from quad_modifiers.tools.inspection.measure.results import Inspection, Recommendation, write_json
from quad_modifiers.tools.inspection.measuring import measure
from quad_modifiers.tools.inspection.page import Section, callout, folded, page, preformatted, table

logger = logging.getLogger(__name__)

REPORT_NAME = "report.html"
NUMBERS_NAME = "inspection.json"


@kept_apart()
def inspect_model(
    model: str | Path,
    output_dir: str | Path,
    *,
    baseline: str | Path | None = None,
    recipe: str | None = None,
    rank: int | None = None,
    layers: Sequence[int] | None = None,
    dataset: CalibrationSource = None,
    text_column: str = "text",
    samples: int = 16,
    eval_windows: int = 4,
    seq_length: int = 512,
    seed: int = 0,
    split: str | None = None,
    dataset_config: str | None = None,
    options: LoadingOptions = DEFAULTS,
    baseline_revision: str | None = None,
) -> Inspection:
    """Measures a model or a QUAD checkpoint and writes report.html, its charts as PNGs, and inspection.json.

    An unquantized model is measured, projected in memory as the recipe says, and measured again. A QUAD checkpoint is
    measured as it is, and against its original where that is given.

    Args:
        model: folder or Hub id of an unquantized causal language model or of a QUAD checkpoint.
        output_dir: folder for the report; new or empty.
        baseline: original of a checkpoint.
        recipe: name or path of the recipe whose projection is applied to an unquantized model; quad_w4a4 by default.
        rank: rank in place of the recipe's.
        layers: blocks whose activations are drawn; by default one at a quarter of the depth and one in the middle.
        dataset: text, as `calibration_windows` takes it; by default
            `quad_modifiers.data.calibration_texts()`, and held-out prose to measure a checkpoint on.
        text_column: column of the text or the conversations in `dataset`.
        samples: number of windows for the spectrum and the projection.
        eval_windows: other windows, which everything else is measured on.
        seq_length: tokens in a window.
        seed: seed that chooses the windows.
        split: split of a `datasets` name or DatasetDict.
        dataset_config: configuration of a `datasets` name.
        options: how model and baseline are loaded; its revision is that of the model.
        baseline_revision: branch, tag or commit of the baseline's Hub id.

    Returns:
        The numbers.

    Raises:
        FileExistsError: if `output_dir` exists and is not empty.
        FileNotFoundError: if there is no such model or recipe.
        ValueError: if the model is of no supported architecture or quantized by another method, an argument does not
            fit it, or there is not enough text.
        ModuleNotFoundError: if matplotlib, or for an unquantized model llm-compressor, is not installed.
    """
    from quad_modifiers.tools.inspection.plots import charts

    target = user_path(output_dir)
    check_target(target)
    text = TextOptions(dataset, text_column, samples, eval_windows, seq_length, seed, split, dataset_config)
    found = measure(model, baseline, recipe, rank, layers, text, options, baseline_revision)
    write_report(target, charts(found), lambda drawn: inspection_page(found, drawn), found, NUMBERS_NAME)
    return found


def write_report(folder: Path, charts: Iterable, build, numbers: object, numbers_name: str) -> None:  # type: ignore[no-untyped-def,type-arg]
    """Draws charts and writes the page, the PNGs and the numbers; all of them or nothing."""
    from quad_modifiers.tools.inspection.figures import draw

    with complete_or_absent(folder) as temporary:
        sections = []
        for chart in charts:
            svg, png = draw(chart)
            (temporary / f"{chart.name}.png").write_bytes(png)
            sections.append(Section(chart.name, chart.title, chart.caption, f"<figure>{svg}</figure>"))
        (temporary / REPORT_NAME).write_text(build(sections), encoding="utf-8")
        write_json(numbers, temporary / numbers_name)
    logger.info("report in %s", folder / REPORT_NAME)


def inspection_page(found: Inspection, charts: Sequence[Section]) -> str:
    """Returns the page of an inspection."""
    subject, settings = found.subject, found.settings
    rank = f"rank {subject.rank}" + (f", {subject.basis} basis" if subject.basis else "")
    facts = [subject.model_type, f"{subject.layers} blocks", f"hidden size {subject.hidden}", rank]
    if subject.kind == "model":
        facts.append(f"unquantized; projected in memory as {subject.recipe} does")
    else:
        facts.append("QUAD checkpoint" + (f"; original {subject.baseline}" if subject.baseline else ""))
    sections = [_with_numbers(section, found) for section in charts]
    recipe = subject.recipe if subject.kind == "checkpoint" else None
    versions = ", ".join(f"{name} {number}" for name, number in settings.versions.items())
    sections.append(
        Section(
            "measured",
            "How this was measured",
            f"{settings.text}: {settings.calibration_windows} windows for the spectrum and the projection, "
            f"{settings.measured_windows} others for everything else, {settings.window_length} tokens each, seed "
            f"{settings.seed}. Losses on so little text are for comparing parts with each other, not for quoting. "
            f"{settings.machine}; {versions}.",
            "" if recipe is None else folded("Recipe of the checkpoint", preformatted(recipe)),
        )
    )
    if found.recommendation is not None:
        sections.append(_recommendation(found.recommendation))
    return page(f"Inspection of {_title(subject.name)}", " · ".join(facts), _cards(found), sections)


def _title(name: str) -> str:
    """Returns the last part of a Hub id, or of the real path of a folder: `.` has a name too."""
    path = Path(name)
    return path.resolve().name if path.is_dir() else path.name


def _cards(found: Inspection) -> list[tuple[str, str]]:
    subject = found.subject
    cards = [(f"{found.reference_perplexity:.2f}", f"perplexity of {found.reference}")]
    if subject.rank:
        cards.append((f"{found.spectrum.held_by(subject.rank):.0%}", f"of the energy in {subject.rank} directions"))
    bits = "4" if subject.kind == "model" else "as stored"
    before, after = found.loss_of("all", "inputs", bits, "before"), found.loss_of("all", "inputs", bits)
    if before is not None:
        cards.append((f"{before.divergence:.3f}", "nats lost by 4-bit inputs before the projection"))
    if after is not None:
        what = "4-bit inputs after it" if before is not None else "quantized inputs"
        cards.append((f"{after.divergence:.3f}", f"nats lost by {what}"))
    weights = found.loss_of("all", "weights", bits)
    if weights is not None and (subject.kind == "model" or subject.baseline):
        rounding = ", rounded to nearest" if subject.kind == "model" else ""
        cards.append((f"{weights.divergence:.3f}", f"nats lost by 4-bit weights{rounding}"))
    if found.recommendation is not None and found.recommendation.recipe is not None:
        cards.append((found.recommendation.recipe, "recommended recipe; why is at the end"))
    return cards


def _with_numbers(section: Section, found: Inspection) -> Section:
    if section.name == "grid-ratio":
        rows = mean_grid_ratios(found)
        return section._replace(
            body=section.body + folded("Means over the blocks", table(GRID_RATIOS, rows, numbers=2))
        )
    return _with_table(section, found) if section.name == "loss-parts" else section


def _with_table(section: Section, found: Inspection) -> Section:
    """Adds the numbers of the losses, which the chart does not show exactly."""
    rows = [
        (
            row.stage if found.subject.kind == "model" else "",
            row.quantized,
            row.part,
            row.bits,
            f"{row.divergence:.4f}",
            f"{row.loss:+.4f}" + ("" if row.stderr is None else f" ± {row.stderr:.4f}"),
            f"{row.perplexity:.2f}",
        )
        for row in found.losses
    ]
    header = ("", "quantized", "part", "bits", "divergence, nats", "loss, nats", "perplexity")
    return section._replace(body=section.body + folded("All numbers", table(header, rows, numbers=3)))


def _recommendation(found: Recommendation) -> Section:
    answer = found.rules[-1].answer if found.rules else "nothing was measured that a rule could use"
    rows = [(rule.number, rule.question, rule.measured, rule.rule, rule.answer) for rule in found.rules]
    return Section(
        "recommendation",
        "Recommendation",
        "Every line is a rule with fixed thresholds, applied to the numbers above, which come from a few windows; "
        "docs/guide/inspection.md gives the reasons. Whether it holds, quad eval tells after compressing.",
        callout(answer) + table(("rule", "question", "measured", "rule", "answer"), rows),
    )
