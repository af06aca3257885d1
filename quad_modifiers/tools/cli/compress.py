"""`quad compress`: from a model and a recipe to a checkpoint."""

import time
from pathlib import Path
from typing import Annotated

import typer

from quad_modifiers.reporting import file_size
from quad_modifiers.tools.cli.options import TEXT_FORMS, DatasetConfig, Seed, SeqLength, Split, TextColumn
from quad_modifiers.tools.console import log_on_stderr, print_table


def register(app: typer.Typer) -> None:
    """Adds the command to `quad`."""
    app.command(
        "compress",
        epilog="Example: quad compress HuggingFaceTB/SmolLM2-135M-Instruct quad_w4a4 -o outputs/SmolLM2-quad\n\n"
        "Python: quad_modifiers.oneshot(model, recipe, output_dir=...)",
    )(compress)


def compress(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an unquantized causal language model.")],
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (see `quad recipes`) or path of a YAML file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for the checkpoint; new or empty.")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            help=f"Calibration text: {TEXT_FORMS}",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 64,
    seq_length: SeqLength = 512,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    split: Split = None,
    dataset_config: DatasetConfig = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id; the model's own by default.", show_default=False)
    ] = None,
) -> None:
    """Compress a model by a recipe and write the checkpoint.

    Recipe, output folder and model type are checked before the weights are loaded. The output appears complete or not
    at all. Progress goes to stderr, the closing table to stdout.
    """
    from quad_modifiers import oneshot
    from quad_modifiers.tools.cli.footprint import peak_memory

    start = time.perf_counter()
    with log_on_stderr(summaries=False):
        oneshot(
            model,
            recipe,
            dataset=dataset,
            output_dir=output,
            tokenizer=tokenizer,
            num_calibration_samples=samples,
            max_seq_length=seq_length,
            text_column=text_column,
            splits=split,
            dataset_config_name=dataset_config,
            seed=seed,
        )
    seconds = time.perf_counter() - start
    rows = [
        ("recipe", recipe),
        *_sizes(model, output),
        ("time", f"{seconds:.0f} s"),
        ("peak memory", peak_memory()),
        ("checkpoint", str(output)),
    ]
    print_table((), rows)


def _sizes(model: str, output: Path) -> list[tuple[str, str]]:
    """Returns the rows on format and size; those on the original only where its safetensors files are at hand."""
    from quad_modifiers.records.inventory import read_inventory
    from quad_modifiers.tools.cli.footprint import original_folder

    after = read_inventory(output)
    rows = [
        ("format", after.format),
        ("size after", f"{file_size(after.total)}, of which embedding and head {file_size(after.embeddings)}"),
    ]
    folder = original_folder(model)
    try:
        before = None if folder is None else read_inventory(folder)
    except (OSError, ValueError):
        before = None  # weights that are stored twice, or unlike ours; the checkpoint is complete without
    if before is not None:
        shrunk = (before.total - before.embeddings) / max(after.total - after.embeddings, 1)
        rows[1:1] = [
            ("size before", f"{file_size(before.total)}, of which embedding and head {file_size(before.embeddings)}")
        ]
        rows.append(("decoder layers", f"{shrunk:.2f} times smaller"))
    return rows
