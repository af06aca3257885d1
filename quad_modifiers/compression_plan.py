"""What a compression will make of a model, and what it will take, told without loading a weight."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from quad_modifiers.before_compression import Job, checked_job
from quad_modifiers.checkpoint.whole_model import DEFAULTS, LoadingOptions
from quad_modifiers.linalg.fast_dtype import fast_dtype
from quad_modifiers.model.architecture import find_architecture
from quad_modifiers.model.decoder import Block, Decoder, PlacedGroup
from quad_modifiers.passes.calibration_stream import work_on, working_device
from quad_modifiers.plugins import architectures
from quad_modifiers.projection.rank import rank_of
from quad_modifiers.recipe.order import PROJECT, QUANTIZE_ACTIVATIONS, QUANTIZE_WEIGHTS, PlacedModifier
from quad_modifiers.recipe.storable import weight_words
from quad_modifiers.recipe.stored_size import stored_size

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier

_LIBRARIES = 700e6  # bytes: torch, transformers and llm-compressor
_BEHIND_PRODUCTS = 1.35  # time of a run over that of its products: SmolLM2-135M on 2 cores of an EPYC, AVX2
_BEHIND_TENSORS = 1.2  # memory of a run over that of what is counted here; within 10 % on two models, of 2.5 and 6.7 GB
_PRODUCT = 1024  # side of the matrices whose product is timed
_RANKS = {"stream": "rank", "values": "o_proj_rank_per_head", "channels": "down_proj_rank"}  # fields of a projection


@dataclass(frozen=True)
class PlannedLinears:
    """The linears of one role.

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
        products: multiplications with addition.
        seconds: about, from a product that was timed on the device.
    """

    linears: tuple[PlannedLinears, ...]
    tokens: int
    original_bytes: int
    checkpoint_bytes: int
    journal_bytes: int
    memory_bytes: int
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
    skeleton = job.source if isinstance(job.source, PreTrainedModel) else _in_stored_dtype(job)
    decoder = Decoder(skeleton, find_architecture(skeleton.config, architectures()))
    tokens = num_calibration_samples * max_seq_length
    shape = _Shape(decoder, job.modifiers, tokens, max_seq_length)
    original = sum(each.numel() * each.element_size() for each in skeleton.parameters())
    stored = stored_size(skeleton, job.modifiers)
    products = shape.products()
    with work_on(options.device):
        rate = _products_per_second(working_device())
    return CompressionPlan(
        tuple(_planned(decoder, job.modifiers)),
        tokens,
        original,
        stored,
        stored + 2 * shape.streams(),
        int(_LIBRARIES) + original + shape.working(),
        products,
        products / rate * _BEHIND_PRODUCTS,
    )


def _in_stored_dtype(job: Job) -> Any:
    """The model on the meta device, in the dtype in which it would be loaded."""
    skeleton = job.source.skeleton()
    wanted = job.options.dtype
    dtype = getattr(torch, wanted) if wanted not in (None, "auto") else skeleton.config.dtype
    return skeleton.to(dtype or torch.float32)


class _Shape:
    """Sizes of the work on one model; a projection is taken to leave the widths as they are but for its outliers."""

    def __init__(self, decoder: Decoder, modifiers: "Sequence[Modifier]", tokens: int, length: int) -> None:
        self.decoder, self.tokens, self.length = decoder, tokens, length
        placed = [PlacedModifier(each) for each in modifiers]
        self.projections = [each.modifier for each in placed if PROJECT in each.roles and not each.is_stock]
        weights = [each.modifier for each in placed if QUANTIZE_WEIGHTS in each.roles and not each.is_stock]
        self.measures = any(getattr(each, name, 0) for each in self.projections for name in _RANKS.values())
        self.calibrates = any(getattr(each, "method", "gptq") == "gptq" for each in weights)
        self.corrects = self.calibrates and any(getattr(each, "error_correction", 0) for each in weights)
        self.sweeps = max((getattr(each, "sweeps", 0) for each in weights), default=0)

    def width(self, group: PlacedGroup) -> int:
        """Inputs of a group, with outlier columns."""
        linear = group.linears[0].module
        wider = [each for each in self.projections if getattr(each, "basis", "") != "square"]
        extra = sum(_outlier(each, group, self.decoder) for each in wider)
        return int(linear.in_features + (extra if group.group.reads == "stream" else 0))

    def streams(self) -> int:
        """Bytes of the residual streams of all tokens."""
        both = 2 if self.corrects else 1
        return 4 * both * self.tokens * self.decoder.geometry.hidden if self.calibrates or self.projections else 0

    def working(self) -> int:
        """Bytes that are needed beyond the model: by a table while it is projected, later by a block."""
        table = self.decoder.embedding.weight
        return max(2 * table.numel() * table.element_size(), self._of_working_block())

    def _of_working_block(self) -> int:
        """A block's weights in float32, streams, inputs and moments."""
        block = self.decoder.blocks[0]
        widths = [self.width(group) for group in block.quantized_groups()]
        held = 2 * self.tokens * sum(widths) if self.corrects else 0  # of the original model, bfloat16
        now = 3 * 4 * self.tokens * max(widths) if self.calibrates else 0  # of a group, and what is made of them
        moments = 9 * 8 * max(widths) ** 2 if self.calibrates else 0  # with what their factorization needs
        weights = 4 * sum(each.numel() for each in block.module.parameters())
        return int(_BEHIND_TENSORS * (self.streams() + held + now + moments + weights))

    def products(self) -> int:
        """Multiplications with addition of all passes."""
        return sum(self._of_block(block) for block in self.decoder.blocks)

    def _of_block(self, block: Block) -> int:
        geometry = self.decoder.geometry
        forward = sum(linear.module.weight.numel() for linear in block.linears())
        forward += 2 * self.length * geometry.heads * geometry.head_dim
        passes = self.measures + self.calibrates * (1 + self.corrects)
        total = self.tokens * passes * forward
        if self.measures:
            total += self.tokens * len(block.norms()) * geometry.hidden**2 // 2
        for group in block.quantized_groups() if self.calibrates else ():
            width, rows = self.width(group), sum(linear.module.out_features for linear in group.linears)
            total += self.tokens * width**2 // 2 * (3 if self.corrects else 1)
            total += rows * width**2 // 2 * (1 + 2 * self.sweeps) + 2 * width**3
        return int(total)


def _outlier(projection: Any, group: PlacedGroup, decoder: Decoder) -> int:
    """Outlier columns of a group's inputs."""
    reads, geometry = group.group.reads, decoder.geometry
    rank = getattr(projection, _RANKS[reads], 0)
    if reads == "values":
        return geometry.heads * rank_of(rank, geometry.head_dim)
    return rank_of(rank, geometry.hidden if reads == "stream" else group.linears[0].module.in_features)


def _planned(decoder: Decoder, modifiers: "Sequence[Modifier]") -> Iterator[PlannedLinears]:
    placed = [PlacedModifier(each) for each in modifiers]
    words = weight_words(placed, [linear.name for linear in decoder.linears()])
    dtype = str(next(decoder.model.parameters()).dtype).removeprefix("torch.")
    bits = next((each.modifier.outlier_bits for each in placed if getattr(each.modifier, "outlier_bits", None)), None)
    roles: dict[tuple[Any, ...], int] = {}
    for group in decoder.groups():
        outlier = sum(
            _outlier(each.modifier, group, decoder) for each in placed if PROJECT in each.roles and not each.is_stock
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
        each.modifier.input_words(group.group)
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
