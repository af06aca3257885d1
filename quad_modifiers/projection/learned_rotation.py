"""Which rotation the sampled inputs of a projected model ask for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from quad_kernels import InputQuantization, InputSplit, fake_quantize, split_input

from quad_modifiers.linalg.flattening import Gain, RotatedRows, flattened, identities, preconditioned, refined
from quad_modifiers.linalg.split_adjoint import unsplit_residual
from quad_modifiers.model.geometry import ModelGeometry

Rows = Callable[[torch.Tensor], RotatedRows]


@dataclass(frozen=True)
class RotationSearch:
    """Settings of the search; `FlattenedRotation` documents their meaning."""

    rounds: int
    start_percentile: float
    end: float
    refinement_rounds: int

    def __call__(
        self, fitted: RotatedRows, chosen: RotatedRows, quantization: InputQuantization | None
    ) -> "LearnedRotation":
        """Returns the rotation for rows that are quantized so; None skips the refinement.

        Args:
            fitted: rows to fit to.
            chosen: rows to choose by.
            quantization: quantization of the rows.
        """
        rotation, flattening, refinement = identities(fitted), None, None
        if not fitted.tokens or not chosen.tokens:  # inputs of zeros throughout, as of a block that was put in
            return LearnedRotation(rotation, None, None)
        if self.rounds:
            found = flattened(fitted, chosen, self.rounds, self.start_percentile, self.end)
            rotation, flattening = found.rotation, found.gain
        if self.refinement_rounds and quantization is not None:
            rounding = partial(fake_quantize, quantization=quantization)
            found = refined(fitted, chosen, rotation, rounding, self.refinement_rounds)
            rotation, refinement = found.rotation, found.gain
        return LearnedRotation(rotation, flattening, refinement)


@dataclass(frozen=True)
class LearnedRotation:
    """A rotation and what the searches gained that led to it.

    Attributes:
        rotation: R, `[blocks, size, size]`, float64.
        flattening: its measure is the mean over tokens of the largest magnitude over the root mean square; None if it
            was not asked for, or all inputs are zero.
        refinement: its measure is the mean squared rounding error over the mean square; None if it was not asked for,
            the inputs are not quantized, or all are zero.
    """

    rotation: torch.Tensor
    flattening: Gain | None
    refinement: Gain | None


def stream_rows(streams: list[torch.Tensor], split: InputSplit) -> RotatedRows:
    """Returns the residual coordinates of the stream as rows for one rotation.

    Args:
        streams: the stream before each norm, `[n, width]` each. Its norm does not count, as each row gets one norm.
        split: division of the input of the stream's readers.
    """
    residual = torch.cat([stream[:, split.rank :] for stream in streams])
    return RotatedRows(preconditioned(residual, split.residual_width)[:, None, None, :])


def value_rows(x: torch.Tensor, split: InputSplit, geometry: ModelGeometry) -> RotatedRows:
    """Returns the residual coordinates of the heads as rows for a rotation of each key-value head.

    Args:
        x: input of a writer of values, `[n, heads * head_dim]`.
        split: its division; its online transform follows the rotation.
        geometry: heads of the model.
    """
    kept = split.outliers
    heads = x.unflatten(-1, (geometry.kv_heads, -1, geometry.head_dim))[..., kept:]

    def online(rows: torch.Tensor) -> torch.Tensor:
        whole = torch.nn.functional.pad(rows.unflatten(-1, (-1, geometry.head_dim - kept)), (kept, 0)).flatten(-2)
        return split_input(whole, split)[1]

    def back(rows: torch.Tensor) -> torch.Tensor:
        return unsplit_residual(rows, split).unflatten(-1, (-1, geometry.head_dim))[..., kept:].flatten(-2)

    return RotatedRows(preconditioned(heads, split.residual_width), online, back)
