"""`quad recipes suggest`: a recipe of mixed precision within a budget of bits."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from quad_modifiers.tools.cli.options import (
    SOURCE_FORM,
    TEXT_FORMS,
    AsJson,
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
    recipe_names,
)
from quad_modifiers.tools.console import log_on_stderr, print_json, print_table


def suggest(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of an unquantized model.")],
    bits: Annotated[
        float,
        typer.Option(
            help="Average of what is stored per weight of the decoder linears, at most; scales and outliers count."
        ),
    ],
    input_bits: Annotated[
        float | None,
        typer.Option(help="Average of the bits of the inputs over all multiplications; the recipe's by default."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="New file for the recipe; else stdout.", callback=expanded),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Recipe to begin with; name or path.", autocompletion=recipe_names)
    ] = "quad_w4a4",
    kept: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="What --save kept, instead of measuring.", callback=expanded),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="New file for what was measured.", callback=expanded),
    ] = None,
    dataset: Annotated[Sources, typer.Option(metavar=SOURCE_FORM, help=f"Text to measure on: {TEXT_FORMS}")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of text for the projection.")] = 16,
    eval_windows: Annotated[int, typer.Option(min=1, help="Other windows, which the parts are measured on.")] = 2,
    seq_length: SeqLength = 512,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    split: Split = None,
    dataset_config: DatasetConfig = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: LoadingDtype = Dtype.auto,
    device: Device = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Choose which linears of which blocks get 8 bits instead of 4, by what that gains and costs on a model.

    Every group of linears is rounded alone, at the recipe's bits and at 8; then those get 8 bits whose divergence falls
    most for the bits that they take. The recipe has `overrides`, and comments that say what was measured.
    """
    from quad_modifiers.data.mixture import named_sources
    from quad_modifiers.tools.suggestion import suggest_recipe

    with log_on_stderr():
        found = suggest_recipe(
            model,
            bits,
            input_bits=input_bits,
            output=output,
            recipe=recipe,
            kept=kept,
            keep=keep,
            dataset=named_sources(dataset or ()),
            text_column=text_column,
            samples=samples,
            eval_windows=eval_windows,
            seq_length=seq_length,
            seed=seed,
            split=split,
            dataset_config=dataset_config,
            options=loading(revision, trust_remote_code, dtype, device, cache_dir),
        )
    if as_json:
        budgets = [asdict(each) for each in found.budgets]
        print_json({"budgets": budgets, "wide": [each.model_dump() for each in found.wide], "recipe": found.text})
        return
    if output is None:
        typer.echo(found.text, nl=False)
        return
    header = ("", "bits wanted", "bits before", "bits", "divergence before", "divergence predicted")
    rows = [
        (
            each.kind,
            f"{each.wanted:g}",
            f"{each.base:.3f}",
            f"{each.average:.3f}",
            f"{each.divergence_before:.4f}",
            f"{each.divergence_after:.4f}",
        )
        for each in found.budgets
    ]
    print_table(header, rows)
    typer.echo(str(output))
