"""How large the work of a compression is: products, and memory with or without what can be on the disk."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers import PreTrainedModel

from quad_modifiers.before_compression import Job, is_ours
from quad_modifiers.model.architecture import find_architecture
from quad_modifiers.model.decoder import Block, Decoder, PlacedGroup
from quad_modifiers.on_disk import can_offload
from quad_modifiers.output_folder import existing_place
from quad_modifiers.passes.calibration_stream import TOKENS_AT_ONCE
from quad_modifiers.plugins import architectures
from quad_modifiers.projection.rank import rank_of
from quad_modifiers.ranks import ranks
from quad_modifiers.recipe.order import PROJECT, QUANTIZE_WEIGHTS, PlacedModifier
from quad_modifiers.reporting import file_size

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier

_LIBRARIES = 700e6  # bytes: torch, transformers and llm-compressor
_BEHIND_TENSORS = 1.2  # memory of a run over that of what is counted here; within 10 % on two models, of 2.5 and 6.7 GB
_RANKS = {"stream": "rank", "values": "o_proj_rank_per_head", "channels": "down_proj_rank"}  # fields of a projection
_ROOM = 0.8  # share of the free memory that a run may take before it goes to the disk
_MEMORY = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup")
"""Where the limits of a container are, in the second version of their interface."""


logger = logging.getLogger(__name__)

Offload = Literal["auto", "disk", "memory"]
"""Where weights and activations are that are not worked on."""


def check_offload(offload: Offload, job: Job) -> None:
    """Checks where a run is to keep what is not worked on.

    Raises:
        ValueError: if there is no such place, or the disk would serve nothing or is not supported.
    """
    if offload not in get_args(Offload):
        raise ValueError(f"offload must be one of {', '.join(get_args(Offload))}, not {offload!r}")
    problem = _offload_problem(job)
    if offload == "disk" and problem is not None:
        raise ValueError(f"offload='disk' {problem}; omit it")


def offload_folder(offload: Offload, job: Job, tokens: int, length: int) -> Path | None:
    """Returns the folder for the files of what is not worked on, None if all stays in memory.

    Args:
        offload: "auto" for the disk where the run would not fit in memory.
        job: the checked run.
        tokens: of calibration text.
        length: tokens per window.
    """
    if offload == "memory" or job.output is None or _offload_problem(job) is not None:
        return None
    folder = existing_place(job.output)
    if offload == "auto":
        free = free_memory()
        if free is None or isinstance(job.source, PreTrainedModel):  # which is in memory
            return None
        needed = WorkSize.of_job(job, -(-tokens // ranks().size), length).in_memory() * ranks().on_this_machine
        if needed <= _ROOM * free:
            return None
        logger.info("%s of memory are free, the run could take %s", file_size(free), file_size(needed))
    logger.info("weights and activations that are not worked on are on the disk, in %s", folder)
    return folder


def _offload_problem(job: Job) -> str | None:
    if not can_offload():
        return "works on Linux only"
    if job.output is None:
        return "has its files beside output_dir, and none is given"
    if not any(is_ours(each) for each in job.modifiers):
        return "is for the modifiers of this package, and the recipe has none"
    return None


def free_memory() -> int | None:
    """Returns the bytes of memory that this process may still use, here and in its container; None if none says."""
    try:
        lines = dict(line.split(":") for line in _MEMORY.read_text(encoding="utf-8").splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return None
    try:
        limit, used, kinds = (
            (CONTAINER / name).read_text(encoding="utf-8") for name in ("memory.max", "memory.current", "memory.stat")
        )
        of_files = int(dict(line.split() for line in kinds.splitlines())["file"])  # which the system takes back
    except (OSError, KeyError):
        return free
    return free if limit.strip() == "max" else min(free, max(0, int(limit) - int(used) + of_files))


def _in_stored_dtype(job: Job) -> Any:
    """The model on the meta device, in the dtype in which it would be loaded; as it is, if it is loaded."""
    if isinstance(job.source, PreTrainedModel):
        return job.source
    skeleton = job.source.skeleton()
    wanted = job.options.dtype
    dtype = getattr(torch, wanted) if wanted not in (None, "auto") else skeleton.config.dtype
    return skeleton.to(dtype or torch.float32)


class WorkSize:
    """Sizes of the work on one model; a projection is taken to leave the widths as they are but for its outliers."""

    def __init__(self, decoder: Decoder, modifiers: "Sequence[Modifier]", tokens: int, length: int) -> None:
        self.decoder, self.tokens, self.length = decoder, tokens, length
        self.original = sum(each.numel() * each.element_size() for each in decoder.model.parameters())
        placed = [PlacedModifier(each) for each in modifiers]
        self.projections = [each.modifier for each in placed if PROJECT in each.roles and not each.is_stock]
        weights = [each.modifier for each in placed if QUANTIZE_WEIGHTS in each.roles and not each.is_stock]
        self.measures = any(getattr(each, name, 0) for each in self.projections for name in _RANKS.values())
        self.calibrates = any(getattr(each, "method", "gptq") == "gptq" for each in weights)
        self.corrects = self.calibrates and any(getattr(each, "error_correction", 0) for each in weights)
        self.sweeps = max((getattr(each, "sweeps", 0) for each in weights), default=0)

    @classmethod
    def of_job(cls, job: Job, tokens: int, length: int) -> "WorkSize":
        """Returns the sizes of a checked run with so many tokens of calibration text, in windows of `length`."""
        skeleton = _in_stored_dtype(job)
        decoder = Decoder(skeleton, find_architecture(skeleton.config, architectures()))
        return cls(decoder, job.modifiers, tokens, length)

    def width(self, group: PlacedGroup) -> int:
        """Inputs of a group, with outlier columns."""
        linear = group.linears[0].module
        wider = [each for each in self.projections if getattr(each, "basis", "") != "square"]
        extra = sum(outlier_columns(each, group, self.decoder) for each in wider)
        return int(linear.in_features + (extra if group.group.reads == "stream" else 0))

    def streams(self) -> int:
        """Bytes of the residual streams of all tokens."""
        both = 2 if self.corrects else 1
        return 4 * both * self.tokens * self.decoder.geometry.hidden if self.calibrates or self.projections else 0

    def in_memory(self) -> int:
        """Bytes of resident memory, at most, with all weights and activations in it."""
        table = self.decoder.embedding.weight
        return int(_LIBRARIES) + self.original + max(2 * table.numel() * table.element_size(), self._of_block_at_work())

    def offloaded(self) -> int:
        """Bytes of resident memory, at most, with weights and activations on the disk but those of one block."""
        table = self.decoder.embedding.weight
        return int(_LIBRARIES) + max(2 * table.numel() * table.element_size(), self._of_block_at_work(TOKENS_AT_ONCE))

    def _of_block_at_work(self, kept: int | None = None) -> int:
        """A block's weights in float32, streams, inputs and moments; activations of so many tokens, of all if None."""
        block = self.decoder.blocks[0]
        widths = [self.width(group) for group in block.quantized_groups()]
        tokens = self.tokens if kept is None else min(self.tokens, kept)
        held = 2 * tokens * sum(widths) if self.corrects else 0  # of the original model, bfloat16
        now = 3 * 4 * tokens * max(widths) if self.calibrates else 0  # of a group, and what is made of them
        moments = 9 * 8 * max(widths) ** 2 if self.calibrates else 0  # with what their factorization needs
        weights = 4 * sum(each.numel() for each in block.module.parameters())
        streams = self.streams() * tokens // self.tokens
        return int(_BEHIND_TENSORS * (streams + held + now + moments + weights))

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


def outlier_columns(projection: Any, group: PlacedGroup, decoder: Decoder) -> int:
    """Outlier columns of a group's inputs."""
    reads, geometry = group.group.reads, decoder.geometry
    rank = getattr(projection, _RANKS[reads], 0)
    if reads == "values":
        return geometry.heads * rank_of(rank, geometry.head_dim)
    return rank_of(rank, geometry.hidden if reads == "stream" else group.linears[0].module.in_features)
