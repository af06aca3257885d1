"""`quad compress`: from a model and a recipe to a checkpoint."""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from quad_modifiers.reporting import file_size
from quad_modifiers.tools.cli.errors import FAILURE
from quad_modifiers.tools.cli.options import (
    SOURCE_FORM,
    TEXT_FORMS,
    AsJson,
    CacheDir,
    CheckpointOutput,
    DatasetConfig,
    Device,
    Dtype,
    LoadingDtype,
    OffloadTo,
    Revision,
    Seed,
    SeqLength,
    Sources,
    Split,
    TextColumn,
    TrustRemoteCode,
    loading,
    recipe_names,
)
from quad_modifiers.tools.console import log_on_stderr, print_json, print_table
from quad_modifiers.torchrun import is_first_rank

if TYPE_CHECKING:
    from quad_modifiers.records.inventory import Inventory
    from quad_modifiers.tools.evaluation.sanity import Sanity

logger = logging.getLogger(__name__)


def compress(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of an unquantized causal language model.")],
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a recipe (see `quad recipes`) or path of a YAML file.", autocompletion=recipe_names
        ),
    ],
    output: CheckpointOutput,
    dataset: Annotated[Sources, typer.Option(metavar=SOURCE_FORM, help=f"Calibration text: {TEXT_FORMS}")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 64,
    seq_length: SeqLength = 512,
    seed: Seed = 0,
    text_column: TextColumn = "text",
    split: Split = None,
    dataset_config: DatasetConfig = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or Hub id; the model's own by default.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="MODIFIER.FIELD=VALUE",
            help="Change a field of the recipe; may be given several times. The checkpoint's recipe.yaml has it.",
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: LoadingDtype = Dtype.auto,
    device: Device = None,
    cache_dir: CacheDir = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same model, recipe and text.")
    ] = False,
    offload: Annotated[
        OffloadTo,
        typer.Option(help="Where weights and activations are that are not worked on; auto: where they fit."),
    ] = OffloadTo.auto,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what each linear becomes, and what memory, disk and time it takes."),
    ] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not measure the perplexity before and after on a few windows.")
    ] = False,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(min=0, help="Exit with 1 if the perplexity after / before is larger; the checkpoint stays."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compress a model by a recipe and write the checkpoint.

    Recipe, output folder and model type are checked before the weights are loaded. The output appears complete or not
    at all; until then OUT.partial keeps what is finished, for --resume. Then original and result are compared on a few
    windows of text, and a warning says if the result is broken. Progress goes to stderr, the closing table to stdout.
    """
    from quad_modifiers import oneshot
    from quad_modifiers.data.mixture import named_sources

    if no_check and max_perplexity_ratio is not None:
        raise ValueError("--no-check leaves out what --max-perplexity-ratio is about; give one of them")
    if dry_run and not is_first_rank():
        return
    if dry_run:
        options = loading(revision, trust_remote_code, dtype, device, cache_dir)
        _show_plan(
            model,
            recipe,
            as_json,
            output_dir=output,
            overrides=overrides or (),
            num_calibration_samples=samples,
            max_seq_length=seq_length,
            resume=resume,
            options=options,
        )
        return
    start = time.perf_counter()
    sources = named_sources(dataset or ())
    with log_on_stderr(summaries=False):
        held = [  # in a list, so that whoever takes it out can let go of it
            oneshot(
                model,
                recipe,
                dataset=sources,
                output_dir=output,
                tokenizer=tokenizer,
                num_calibration_samples=samples,
                max_seq_length=seq_length,
                text_column=text_column,
                splits=split,
                dataset_config_name=dataset_config,
                seed=seed,
                overrides=overrides or (),
                precision=dtype.value,
                model_revision=revision,
                trust_remote_code_model=trust_remote_code,
                cache_dir=cache_dir,
                device=device,
                resume=resume,
                offload=offload.value,
            )
        ]
        if not is_first_rank():
            return
        cost = _Cost.since(start)  # the comparison is no part of it
        seen = None
        if not no_check:
            seen = _sanity(
                held,
                model,
                dataset=sources or None,
                tokenizer=tokenizer,
                sequence_length=seq_length,
                seed=seed,
                text_column=text_column,
                splits=split,
                dataset_config_name=dataset_config,
                options=loading(revision, trust_remote_code, dtype, device, cache_dir),
            )
    before, after = _inventories(original_folder(model, revision, cache_dir), output)
    if as_json:
        print_json(_summary(recipe, output, before, after, cost, seen))
    else:
        took = (("time", f"{cost.seconds:.0f} s"), ("peak memory", cost.memory))
        rows = [("recipe", recipe), *_sizes(before, after), *_seen(seen), *took, ("checkpoint", str(output))]
        print_table((), rows)
    if max_perplexity_ratio is not None and (seen is None or not seen.ratio <= max_perplexity_ratio):
        raise typer.Exit(FAILURE)


def _show_plan(model: str, recipe: str, as_json: bool, **arguments: Any) -> None:
    """Prints what the compression would make and take."""
    from quad_modifiers.compression_plan import plan_compression

    with log_on_stderr(summaries=False):
        plan = plan_compression(model, recipe, **arguments)
    if as_json:
        print_json(asdict(plan))
        return
    header = ("linear", "number", "inputs x outputs", "weight", "inputs", "outlier columns")
    print_table(
        header,
        [
            (
                each.role,
                str(each.count),
                f"{each.width} x {each.outputs}",
                each.weight,
                each.inputs,
                f"{each.outlier}, {each.outlier_weight}" if each.outlier else "none",
            )
            for each in plan.linears
        ],
    )
    rows = [
        ("size before", file_size(plan.original_bytes)),
        ("size after", f"at most {file_size(plan.checkpoint_bytes)}"),
        ("disk until it is complete", f"about {file_size(plan.checkpoint_bytes + plan.journal_bytes)}"),
        ("memory", f"about {file_size(plan.memory_bytes)}; {file_size(plan.offloaded_bytes)} with --offload disk"),
        ("time", f"about {_duration(plan.seconds)} for {plan.tokens} tokens of calibration text"),
    ]
    print_table((), rows)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _inventories(original: Path | None, output: Path) -> "tuple[Inventory | None, Inventory]":
    """Returns what the files of original and checkpoint hold; None where those of the original are not at hand."""
    from quad_modifiers.records.inventory import read_inventory

    try:
        before = None if original is None else read_inventory(original)
    except (OSError, ValueError):
        before = None  # weights that are stored twice, or unlike ours; the checkpoint is complete without
    return before, read_inventory(output)


def _sanity(held: list[Any], original: str, **arguments: Any) -> "Sanity | None":
    """Compares the model in `held`, which is emptied, with the original; None, and a warning, if that cannot be done.

    The checkpoint is written already: nothing that happens here may look as if it were not.
    """
    from quad_modifiers.tools.evaluation.sanity import BROKEN, SanityCheck

    try:
        seen = SanityCheck(original, **arguments).compare(held.pop)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        logger.warning("the checkpoint is written, but could not be looked at: %s", error)
        return None
    if not seen.ratio <= BROKEN:
        logger.warning(
            "the perplexity is %.1f times the original's: the checkpoint is written, but something is wrong with it, "
            "or the recipe does not suit this model; `quad inspect` says what does",
            seen.ratio,
        )
    return seen


def _seen(seen: "Sanity | None") -> list[tuple[str, str]]:
    """Returns the rows on what was seen of original and result."""
    if seen is None:
        return []
    values = f"{seen.before.perplexity:.2f} before, {seen.after.perplexity:.2f} after: {seen.ratio:.3f} times"
    rows = [("perplexity", f"{values} ({seen.windows} windows of {seen.text})")]
    if seen.prompt:
        rows += [
            ("it goes on, before", f"{seen.prompt} … {seen.before.continuation}"),
            ("it goes on, after", f"{seen.prompt} … {seen.after.continuation}"),
        ]
    return rows


def _summary(
    recipe: str,
    output: Path,
    before: "Inventory | None",
    after: "Inventory",
    cost: "_Cost",
    seen: "Sanity | None",
) -> dict[str, Any]:
    """Returns the closing table for programs: sizes in bytes, time in seconds, memory in bytes."""

    def size(held: "Inventory | None") -> dict[str, int] | None:
        return None if held is None else {"total": held.total, "embedding_and_head": held.embeddings}

    return {
        "recipe": recipe,
        "format": after.format,
        "size_before": size(before),
        "size_after": size(after),
        "seconds": round(cost.seconds, 1),
        "peak_memory": cost.peak or None,
        "sanity": None if seen is None else asdict(seen) | {"ratio": seen.ratio},
        "checkpoint": str(output),
    }


def _sizes(before: "Inventory | None", after: "Inventory") -> list[tuple[str, str]]:
    """Returns the rows on format and size; those on the original only where its safetensors files are at hand."""

    def size(held: "Inventory") -> str:
        return f"{file_size(held.total)}, of which embedding and head {file_size(held.embeddings)}"

    if before is None:
        return [("format", after.format), ("size after", size(after))]
    shrunk = f"{(before.total - before.embeddings) / max(after.total - after.embeddings, 1):.2f} times smaller"
    sizes = [("size before", size(before)), ("size after", size(after))]
    return [("format", after.format), *sizes, ("decoder layers", shrunk)]


class _Cost(NamedTuple):
    """What the compression took: seconds, bytes, and the latter in words."""

    seconds: float
    peak: int
    memory: str

    @classmethod
    def since(cls, start: float) -> "_Cost":
        """Of what began at `start`, as `time.perf_counter` counts."""
        from quad_modifiers.records.machine import peak_memory

        peak = peak_memory()
        return cls(time.perf_counter() - start, peak, _memory(peak))


def _memory(peak: int) -> str:
    """Returns the largest resident memory of this process so far, and of its CUDA device if it used one."""
    import torch

    parts = [f"{peak / 2**30:.2f} GiB"] if peak else []
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU")
    return ", ".join(parts) or "not measured on this platform"


def original_folder(model: str, revision: str | None = None, cache_dir: Path | None = None) -> Path | None:
    """Returns the folder of a model that was just loaded, in the Hub's cache for a Hub id.

    None if it holds no safetensors files.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model, "config.json", cache_dir=cache_dir, revision=revision)
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    return folder if any(folder.glob("*.safetensors")) else None
