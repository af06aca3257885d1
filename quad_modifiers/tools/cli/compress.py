"""`quad compress`: from a model and a recipe to a checkpoint."""

import time
from pathlib import Path
from typing import Annotated

import typer

from quad_modifiers.reporting import file_size
from quad_modifiers.tools.cli.options import (
    TEXT_FORMS,
    CheckpointOutput,
    DatasetConfig,
    Seed,
    SeqLength,
    Split,
    TextColumn,
)
from quad_modifiers.tools.console import log_on_stderr, print_table


def compress(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an unquantized causal language model.")],
    recipe: Annotated[str, typer.Argument(help="Name of a recipe (see `quad recipes`) or path of a YAML file.")],
    output: CheckpointOutput,
    dataset: Annotated[str | None, typer.Option(help=f"Calibration text: {TEXT_FORMS}")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 64,
    seq_length: SeqLength = 512,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    split: Split = None,
    dataset_config: DatasetConfig = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id; the model's own by default.")] = None,
) -> None:
    """Compress a model by a recipe and write the checkpoint.

    Recipe, output folder and model type are checked before the weights are loaded. The output appears complete or not
    at all. Progress goes to stderr, the closing table to stdout.
    """
    from quad_modifiers import oneshot

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
    took = (("time", f"{seconds:.0f} s"), ("peak memory", _memory()))
    print_table((), [("recipe", recipe), *_sizes(model, output), *took, ("checkpoint", str(output))])


def _sizes(model: str, output: Path) -> list[tuple[str, str]]:
    """Returns the rows on format and size; those on the original only where its safetensors files are at hand."""
    from quad_modifiers.records.inventory import Inventory, read_inventory

    def size(held: Inventory) -> str:
        return f"{file_size(held.total)}, of which embedding and head {file_size(held.embeddings)}"

    after = read_inventory(output)
    folder = original_folder(model)
    try:
        before = None if folder is None else read_inventory(folder)
    except (OSError, ValueError):
        before = None  # weights that are stored twice, or unlike ours; the checkpoint is complete without
    if before is None:
        return [("format", after.format), ("size after", size(after))]
    shrunk = f"{(before.total - before.embeddings) / max(after.total - after.embeddings, 1):.2f} times smaller"
    sizes = [("size before", size(before)), ("size after", size(after))]
    return [("format", after.format), *sizes, ("decoder layers", shrunk)]


def _memory() -> str:
    """Returns the largest resident memory of this process so far, and of its CUDA device if it used one."""
    import torch

    from quad_modifiers.records.machine import peak_memory

    peak = peak_memory()
    parts = [f"{peak / 2**30:.2f} GiB"] if peak else []
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU")
    return ", ".join(parts) or "not measured on this platform"


def original_folder(model: str) -> Path | None:
    """Returns the folder of a model that was just loaded, in the Hub's cache for a Hub id.

    None if it holds no safetensors files.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json")
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    return folder if any(folder.glob("*.safetensors")) else None
