"""`quad finetune` and `quad merge`: train the outlier weights of a checkpoint, and write them into one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quad_modifiers.reporting import file_size
from quad_modifiers.tools.cli.options import (
    SOURCE_FORM,
    TEXT_FORMS,
    CacheDir,
    CheckpointOutput,
    DatasetConfig,
    Device,
    Dtype,
    LoadingDtype,
    Revision,
    Sources,
    Split,
    TextColumn,
    TrustRemoteCode,
    expanded,
    loading,
)
from quad_modifiers.tools.console import log_on_stderr, print_table

if TYPE_CHECKING:
    from quad_modifiers.records.tuning_record import Tuning


def finetune(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of a QUAD checkpoint.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the adapter; new or empty.", callback=expanded),
    ],
    data: Annotated[
        Sources, typer.Option("--data", "--dataset", metavar=SOURCE_FORM, help=f"Text to train on: {TEXT_FORMS}")
    ] = None,
    distill_from: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Folder or Hub id of the original model: train towards its predictions. Without it, on the next "
            "token.",
        ),
    ] = None,
    merge: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT",
            help="Also write a checkpoint with the adapter merged, as `quad merge` does.",
            callback=expanded,
        ),
    ] = None,
    text_column: TextColumn = "text",
    split: Split = None,
    dataset_config: DatasetConfig = None,
    seq_length: Annotated[int, typer.Option(min=2, help="Tokens in a sample.")] = 512,
    samples: Annotated[
        int | None, typer.Option(min=2, help="At most so many, drawn at random; all by default.")
    ] = None,
    packed: Annotated[
        bool, typer.Option("--pack/--no-pack", help="Windows of one stream of text, or one padded sample per document.")
    ] = True,
    validation: Annotated[float, typer.Option(help="Share of the samples to evaluate on during the training.")] = 0.05,
    epochs: Annotated[float, typer.Option(help="Passes over the samples.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="End the run after so many steps.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples in a forward pass, on each device.")] = 4,
    accumulation: Annotated[int, typer.Option(min=1, help="Forward passes in a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Largest learning rate; it falls to zero by a cosine.")] = 2e-5,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which the learning rate rises.")] = 0.05,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 1.0,
    train: Annotated[
        str,
        typer.Option(
            metavar="PARTS",
            help="What is trained: outliers, and after a comma scales and weights, the scales and integers of the "
            "4-bit weights; merge such an adapter.",
        ),
    ] = "outliers",
    weight_learning_rate: Annotated[
        float, typer.Option(help="Largest learning rate of the integers, in steps of their grid, with --train weights.")
    ] = 0.003,
    fixed_share: Annotated[
        float, typer.Option(help="Share of the steps, at the end, in which trained integers stay as they are.")
    ] = 0.2,
    weight_scales: Annotated[bool, typer.Option("--weight-scales", help="The same as scales in --train.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    evaluations: Annotated[int, typer.Option(min=2, help="Evaluations during the run, each followed by a save.")] = 10,
    teacher_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Compute the original model's hidden states once and keep them here; it is then not in memory while "
            "training.",
            callback=expanded,
        ),
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="Integrations of transformers, such as tensorboard; may be repeated.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same settings.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice and the order of the samples.")] = 0,
    revision: Revision = None,
    original_revision: Annotated[
        str | None, typer.Option(metavar="REF", help="Branch, tag or commit of the Hub id given as --distill-from.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: LoadingDtype = Dtype.auto,
    device: Device = None,
    cache_dir: CacheDir = None,
) -> None:
    """Fine-tune a QUAD checkpoint through its full-precision outlier weights.

    Writes a PEFT LoRA folder, with a record of the training (tuning.json) and its loss curve. The 4-bit weights stay as
    they are. States of the run are kept in a folder DIR.training until it is done.
    """
    from quad_modifiers.data.mixture import named_sources
    from quad_modifiers.output_folder import check_target
    from quad_peft import training

    if merge is not None:
        check_target(merge)
    with log_on_stderr():
        options = loading(revision, trust_remote_code, dtype, device, cache_dir)
        settings = training.TuningSettings(
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            warmup=warmup,
            temperature=temperature,
            gradient_checkpointing=gradient_checkpointing,
            evaluations=evaluations,
            seed=seed,
            report_to=tuple(report_to or ()),
            train=tuple(train.split(",")),
            weight_learning_rate=weight_learning_rate,
            fixed_share=fixed_share,
        )
        result = training.finetune(
            checkpoint,
            output,
            data=named_sources(data or ()),
            original=distill_from,
            settings=settings,
            length=seq_length,
            samples=samples,
            packed=packed,
            validation=validation,
            text_column=text_column,
            split=split,
            dataset_config=dataset_config,
            train_weight_scales=weight_scales,
            teacher_cache=teacher_cache,
            resume=resume,
            options=options,
            original_revision=original_revision,
        )
        if not result.is_main_process:
            return
        if merge is not None:
            training.merge(checkpoint, output, merge, loading(revision, trust_remote_code, Dtype.auto, None, cache_dir))
    _print(result.record, output, merge)


def _print(record: "Tuning", adapter: Path, merged: Path | None) -> None:
    before, after = record.before, record.after
    qualities = [("perplexity", f"{before.perplexity:.3f}", f"{after.perplexity:.3f}")]
    if before.divergence is not None and after.divergence is not None:
        qualities.append(("KL to the original", f"{before.divergence:.4f}", f"{after.divergence:.4f}"))
    if record.original_perplexity is not None:
        qualities.append(("perplexity of the original", f"{record.original_perplexity:.3f}", ""))
    print_table(("", "before", "after"), qualities, title="on validation samples, never trained on")
    size = sum(file.stat().st_size for file in adapter.glob("*.safetensors"))
    kept = f"the state after step {record.best_step}, the best on the validation samples"
    if not record.best_step:
        kept = "the start: no later state was better on the validation samples; lower the learning rate"
    rows = [
        ("trained", f"{record.trainable_parameters:,} parameters in {record.steps} steps"),
        ("kept", kept),
        ("time", f"{record.seconds:.0f} s"),
        ("adapter", f"{adapter} ({file_size(size)})"),
    ]
    print_table((), [*rows, ("checkpoint", str(merged))] if merged is not None else rows)


def merge(
    checkpoint: Annotated[str, typer.Argument(help="Folder or Hub id of the QUAD checkpoint it was trained on.")],
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.", callback=expanded)],
    output: CheckpointOutput,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    cache_dir: CacheDir = None,
) -> None:
    """Write a checkpoint with an adapter merged into its outlier weights.

    The result is an ordinary QUAD checkpoint: it loads, serves and publishes as any other, and costs nothing more.
    """
    from quad_modifiers.records.inventory import read_inventory
    from quad_peft import training

    with log_on_stderr():
        training.merge(checkpoint, adapter, output, loading(revision, trust_remote_code, Dtype.auto, None, cache_dir))
    print_table((), [("checkpoint", f"{output} ({file_size(read_inventory(output).total)})")])
