"""`quad inspect`: a report by which people choose rank and bits."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quad_modifiers.tools.cli.options import (
    SOURCE_FORM,
    AsJson,
    BaselineRevision,
    CacheDir,
    DatasetConfig,
    Device,
    Dtype,
    LoadingDtype,
    Revision,
    Seed,
    SeqLength,
    Sources,
    Split,
    TextColumn,
    TrustRemoteCode,
    expanded,
    loading,
)
from quad_modifiers.tools.console import log_on_stderr, print_json, print_table


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|OUT", help="Folder or Hub id of an unquantized model or a QUAD checkpoint.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the report; new or empty.", callback=expanded),
    ],
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Original of a checkpoint, to measure it against.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe whose projection an unquantized model is shown with; name or path. By default quad_w4a4."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Rank of that projection; the recipe's by default.")] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Block whose activations are drawn; may be given several times. By default one at a quarter of the "
            "depth and one in the middle.",
        ),
    ] = None,
    dataset: Annotated[
        Sources,
        typer.Option(
            metavar=SOURCE_FORM,
            help="Text to run on: a text or jsonl file, or a name in `datasets`, of text or of conversations. Several "
            "with weights: give the option again, A:0.7 and B:0.3. By default Wikipedia articles that gensim ships "
            "and Python code.",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text for spectrum and projection.")] = 16,
    eval_windows: Annotated[int, typer.Option(min=1, help="Other windows, for everything else.")] = 4,
    seq_length: SeqLength = 512,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    split: Split = None,
    dataset_config: DatasetConfig = None,
    revision: Revision = None,
    baseline_revision: BaselineRevision = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: LoadingDtype = Dtype.auto,
    device: Device = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Show what quantization does to a model: activations, spectrum, errors, and where the perplexity is lost.

    An unquantized model is measured as it is and as the projection of a recipe would make it; nothing is written but
    the report. A QUAD checkpoint is measured as stored. The report is one HTML file, with its charts as PNGs and its
    numbers as JSON beside it, and ends with a recommendation, which is also printed, with how coarse the 4-bit grids
    are on either side of the projection; with --json, the recommendation as JSON.
    """
    from quad_modifiers.data.mixture import named_sources
    from quad_modifiers.tools.inspection import inspect_model
    from quad_modifiers.tools.inspection.measure.grid_ratios import HEADER as GRID_RATIOS
    from quad_modifiers.tools.inspection.measure.grid_ratios import mean_grid_ratios
    from quad_modifiers.tools.inspection.model_report import NUMBERS_NAME, REPORT_NAME

    with log_on_stderr():
        found = inspect_model(
            model,
            output,
            baseline=baseline,
            recipe=recipe,
            rank=rank,
            layers=layer,
            dataset=named_sources(dataset or ()),
            text_column=text_column,
            samples=samples,
            eval_windows=eval_windows,
            seq_length=seq_length,
            seed=seed,
            split=split,
            dataset_config=dataset_config,
            options=loading(revision, trust_remote_code, dtype, device, cache_dir),
            baseline_revision=baseline_revision,
        )
    if as_json:
        recommendation = None if found.recommendation is None else asdict(found.recommendation)
        files = {"report": str(output / REPORT_NAME), "numbers": str(output / NUMBERS_NAME)}
        print_json({"recommendation": recommendation, **files})
        return
    rules = found.recommendation.rules if found.recommendation is not None else []
    header = ("rule", "question", "measured", "answer")
    print_table(header, [(rule.number, rule.question, rule.measured, rule.answer) for rule in rules])
    print_table(GRID_RATIOS, mean_grid_ratios(found))
    typer.echo(str(output / REPORT_NAME))
