"""What a compression will make of a model, and what it will take, told without loading a weight."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from quad_modifiers.before_compression import checked_job
from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions
from quad_modifiers.compression_size import WorkSize, outlier_columns
from quad_modifiers.linalg.fast_dtype import fast_dtype
from quad_modifiers.model.decoder import Decoder, PlacedGroup
from quad_modifiers.passes.calibration_stream import work_on, working_device
from quad_modifiers.recipe.order import PROJECT, QUANTIZE_ACTIVATIONS, PlacedModifier
from quad_modifiers.recipe.storable import weight_words
from quad_modifiers.recipe.stored_size import stored_size

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier

_BEHIND_PRODUCTS = 1.35  # time of a run over that of its products: SmolLM2-135M on 2 cores of an EPYC, AVX2
_PRODUCT = 1024  # side of the matrices whose product is timed


@dataclass(frozen=True)
class PlannedLinears:
    """The linears of one role, or those of it that are treated alike.

    Attributes:
        role: as recipes name it.
        count: how many there are.
        width: inputs, in the original.
        outputs: output channels, in the original.
        weight: what the weights become, in words.
        inputs: what the inputs become at run time, in words.
        outlier: outlier columns that are added to or taken from the inputs.
        outlier_weight: what the weights of those become, in words.
    """

    role: str
    count: int
    width: int
    outputs: int
    weight: str
    inputs: str
    outlier: int
    outlier_weight: str


@dataclass(frozen=True)
class CompressionPlan:
    """What a compression will make and take.

    Attributes:
        linears: by role.
        tokens: of calibration text.
        original_bytes: tensors of the original.
        checkpoint_bytes: tensors of the checkpoint, at most.
        journal_bytes: what is kept beside the output until it is complete, about.
        memory_bytes: largest resident memory, about; on a GPU, that of both together.
        offloaded_bytes: the same with weights and activations on the disk.
        products: multiplications with addition.
        seconds: about, from a product that was timed on the device.
    """

    linears: tuple[PlannedLinears, ...]
    tokens: int
    original_bytes: int
    checkpoint_bytes: int
    journal_bytes: int
    memory_bytes: int
    offloaded_bytes: int
    products: int
    seconds: float


def plan_compression(
    model: str | Path | PreTrainedModel,
    recipe: Any,
    *,
    output_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
    num_calibration_samples: int = 64,
    max_seq_length: int = 512,
    resume: bool = False,
    options: LoadingOptions = DEFAULTS,
) -> CompressionPlan:
    """Returns what `oneshot` with these arguments will make and take; it refuses what `oneshot` refuses beforehand.

    The time is an estimate: that of the products, at a rate that is measured on the device, and a third more. It leaves
    out the training of `OutlierLoRA`, and what `FlattenedRotation`, `LowRankBranch` and stock modifiers do.

    Args:
        model: folder, hub id, or loaded transformers model.
        recipe: as for `oneshot`.
        output_dir: as for `oneshot`; nothing stays there.
        overrides: as for `oneshot`.
        num_calibration_samples: windows of calibration text.
        max_seq_length: tokens per window.
        resume: as for `oneshot`.
        options: how the model would be loaded; its device is where the blocks would be worked on.

    Raises:
        RecipeError, FileNotFoundError, FileExistsError, ValueError, TypeError, OSError: as `oneshot`.
    """
    job = checked_job(model, recipe, overrides, output_dir, options, {}, resume)
    job.check_model(max_seq_length, None)
    tokens = num_calibration_samples * max_seq_length
    shape = WorkSize.of_job(job, tokens, max_seq_length)
    decoder = shape.decoder
    stored = stored_size(decoder.model, job.modifiers)
    products = shape.products()
    with work_on(options.device):
        rate = _products_per_second(working_device())
    return CompressionPlan(
        tuple(_planned(decoder, job.modifiers)),
        tokens,
        shape.original,
        stored,
        stored + 2 * shape.streams(),
        shape.in_memory(),
        shape.offloaded(),
        products,
        products / rate * _BEHIND_PRODUCTS,
    )


def _planned(decoder: Decoder, modifiers: "Sequence[Modifier]") -> Iterator[PlannedLinears]:
    placed = [PlacedModifier(each) for each in modifiers]
    words = weight_words(placed, list(decoder.linears()))
    dtype = str(next(decoder.model.parameters()).dtype).removeprefix("torch.")
    bits = next((each.modifier.outlier_bits for each in placed if getattr(each.modifier, "outlier_bits", None)), None)
    roles: dict[tuple[Any, ...], int] = {}
    for group in decoder.groups():
        outlier = sum(
            outlier_columns(each.modifier, group, decoder)
            for each in placed
            if PROJECT in each.roles and not each.is_stock
        )
        for linear in group.linears:
            module = linear.module
            row = (
                linear.role,
                int(module.in_features),
                int(module.out_features),
                words[linear.name] or dtype,
                _input_words(placed, group, dtype),
                outlier,
                "" if not outlier else dtype if bits is None or not words[linear.name] else f"{bits} bits",
            )
            roles[row] = roles.get(row, 0) + 1
    for (role, *rest), count in roles.items():
        yield PlannedLinears(role, count, *rest)


def _input_words(placed: Sequence[PlacedModifier], group: PlacedGroup, dtype: str) -> str:
    found = [
        each.modifier.input_words(group)
        for each in placed
        if QUANTIZE_ACTIVATIONS in each.roles and hasattr(type(each.modifier), "input_words")
    ]
    return next((words for words in found if words), dtype)


def _products_per_second(device: torch.device) -> float:
    """Multiplications with addition per second of one matrix product, the best of five."""
    a = torch.ones(_PRODUCT, _PRODUCT, device=device, dtype=fast_dtype(device))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return _PRODUCT**3 / best
