"""`quad compare`: checkpoints side by side."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quad_modifiers.tools.cli.options import (
    AsJson,
    BaselineRevision,
    CacheDir,
    Device,
    Dtype,
    LoadingDtype,
    Seed,
    SeqLength,
    TextColumn,
    TrustRemoteCode,
    all_expanded,
    expanded,
    loading,
)
from quad_modifiers.tools.console import log_on_stderr, print_json, print_table


def compare(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(metavar="OUT...", help="Folders with checkpoints, two or more.", callback=all_expanded),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for the report; new or empty. Without it, the table alone.",
            callback=expanded,
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original that all were made of; each is run beside it.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="With --baseline, text to run on: a text or jsonl file, or a name in `datasets`. By default the "
            "Wikipedia articles in gensim that never calibrate."
        ),
    ] = None,
    eval_windows: Annotated[int, typer.Option(min=1, help="Windows of that text.")] = 4,
    seq_length: SeqLength = 512,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    baseline_revision: BaselineRevision = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: LoadingDtype = Dtype.auto,
    device: Device = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Compare checkpoints: recipe, format, size, measured results, and the error of each block against the original.

    Without --baseline only files are read. Results come from the evaluation.json that `quad eval` leaves in a folder.
    """
    from quad_modifiers.tools.inspection import compare_checkpoints
    from quad_modifiers.tools.inspection.compared import comparison_rows

    with log_on_stderr():
        found = compare_checkpoints(
            checkpoints,
            output,
            baseline=baseline,
            dataset=dataset,
            text_column=text_column,
            eval_windows=eval_windows,
            seq_length=seq_length,
            seed=seed,
            options=loading(baseline_revision, trust_remote_code, dtype, device, cache_dir),
        )
    if as_json:
        print_json(asdict(found))
        return
    print_table(*comparison_rows(found))
    if output is not None:
        from quad_modifiers.tools.inspection.model_report import REPORT_NAME

        typer.echo(str(output / REPORT_NAME))
