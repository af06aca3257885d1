"""Rotations under which no coordinate of a row stands out, found without gradients.

A symmetric grid of a token has a step in proportion to its largest magnitude, and a rotation keeps the token's norm: so
the grid is finest where the largest magnitude is least. The steps here alternate between a target that is flatter than
the rotated rows and the rotation that comes nearest to it. docs/concepts/frtq.md has the derivation and the proof that
the distance never rises.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Map = Callable[[torch.Tensor], torch.Tensor]

_PUSH = 1.5  # growth of the over-relaxation while it lowers the distance
_FAR = 64.0  # its limit
_SETTLED = 1e-4  # relative fall of an error below which nothing more is gained


class RotatedRows:
    """Rows X and what becomes of them under a rotation R of each block: J(X R).

    J is an isometry that follows: an online transform, or nothing.

    Args:
        rows: X, `[tokens, blocks, copies, size]`, floating point: the coordinates that are rotated. The copies of a
            block, such as the query heads that read one value head, share its rotation.
        online: J, from `[tokens, blocks * copies * size]` to `[tokens, width]`; None for nothing.
        back: its transpose.
    """

    def __init__(self, rows: torch.Tensor, online: Map | None = None, back: Map | None = None) -> None:
        self.tokens, self.blocks, self.copies, self.size = rows.shape
        self._rows = rows.permute(1, 0, 2, 3).flatten(1, 2)  # [blocks, tokens * copies, size]
        self._online, self._back = online, back

    def turned(self, rotation: torch.Tensor) -> torch.Tensor:
        """Returns J(X R), `[tokens, width]`, for R `[blocks, size, size]`."""
        turned = self._rows @ rotation.to(self._rows)
        flat = turned.unflatten(1, (self.tokens, self.copies)).permute(1, 0, 2, 3).flatten(1)
        return flat if self._online is None else self._online(flat)

    def nearest(self, wanted: torch.Tensor) -> torch.Tensor:
        """Returns the R that brings J(X R) nearest to `wanted`, `[tokens, width]`, by least squares.

        Orthogonal Procrustes: with X^T J^T(wanted) = U S V^T it is U V^T.

        Returns:
            `[blocks, size, size]`, float64.
        """
        flat = wanted if self._back is None else self._back(wanted)
        parts = flat.view(self.tokens, self.blocks, self.copies, self.size).permute(1, 0, 2, 3).flatten(1, 2)
        cross = self._rows.mT @ parts
        left, _, right = torch.linalg.svd(cross.double())
        return left @ right


@dataclass(frozen=True)
class Gain:
    """What a rotation does to rows that it was not fitted to.

    Attributes:
        before: measure of the rotation at the start, mean over the rows.
        after: measure of the rotation that was found, never above `before`.
        rounds: rounds that led to it.
    """

    before: float
    after: float
    rounds: int


@dataclass(frozen=True)
class Found:
    """A rotation and what it gains.

    Attributes:
        rotation: R, `[blocks, size, size]`, float64.
        gain: on rows that it was not fitted to.
    """

    rotation: torch.Tensor
    gain: Gain


def preconditioned(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Returns rows with a mean square of 1 over `width` coordinates, so that each counts alike; rows of zeros go.

    Args:
        rows: `[tokens, ...]`, floating point.
        width: number of coordinates of a row once it is rotated, zeros of an online transform included.
    """
    flat = rows.flatten(1)
    norms = torch.linalg.vector_norm(flat, dim=1)
    kept = norms > torch.finfo(rows.dtype).tiny
    scale = width**0.5 / norms[kept]
    return rows[kept] * scale.view(-1, *[1] * (rows.dim() - 1))


def distance_to_box(rows: torch.Tensor, bound: float) -> float:
    """Returns the sum of squared distances of rows to the box of magnitudes up to `bound`."""
    return float((rows.abs() - bound).clamp_(min=0).square_().sum(dtype=torch.float64))


def mean_peak(rows: torch.Tensor) -> float:
    """Returns the mean over rows of the largest magnitude over the root mean square."""
    return float((rows.abs().amax(1) / rows.square().mean(1).sqrt()).mean())


def identities(rows: RotatedRows) -> torch.Tensor:
    """Returns the rotation that changes nothing, `[blocks, size, size]`, float64."""
    return torch.eye(rows.size, dtype=torch.float64).repeat(rows.blocks, 1, 1)


def flattened(rows: RotatedRows, held_out: RotatedRows, rounds: int, percentile: float, end: float) -> Found:
    """Returns the rotation of all rounds under which held-out rows have the least mean peak (`mean_peak`).

    The bound of the box falls from round to round by one factor.

    Args:
        rows: rows with a mean square of 1, to fit the rotation to.
        held_out: other rows, to choose by.
        rounds: number of rounds, at least 1.
        percentile: bound of the first round, as a percentile of the rows' largest magnitudes.
        end: bound of the last round.
    """
    rotation = identities(rows)
    peaks = rows.turned(rotation).abs().amax(1).sort().values
    start = max(float(peaks[round((len(peaks) - 1) * percentile / 100)]), end)
    bounds = [start * (end / start) ** (step / max(rounds - 1, 1)) for step in range(rounds)]
    return _best(held_out, rotation, flattening_steps(rows, rotation, bounds), mean_peak)


def refined(rows: RotatedRows, held_out: RotatedRows, rotation: torch.Tensor, rounding: Map, rounds: int) -> Found:
    """Returns a rotation under which held-out rows lose less by rounding (DFRot, arXiv 2412.00648).

    The target of a round is the rotated rows as they are rounded. As the grid of a row moves with its largest
    magnitude, a round may raise the error: the rounds end where the error of the rows no longer falls.

    Args:
        rows: rows with a mean square of 1, to fit the rotation to.
        held_out: other rows, to choose by.
        rotation: R at the start, `[blocks, size, size]`.
        rounding: what rounds `[tokens, width]`.
        rounds: largest number of rounds.
    """
    steps = _rounding_steps(rows, rotation, rounding, rounds)
    return _best(held_out, rotation, steps, lambda turned: _rounding_error(turned, rounding(turned)))


def _best(
    held_out: RotatedRows, start: torch.Tensor, steps: Iterator[torch.Tensor], measure: Callable[[torch.Tensor], float]
) -> Found:
    before = measure(held_out.turned(start))
    best = Found(start, Gain(before, before, 0))
    for index, rotation in enumerate(steps, start=1):
        found = measure(held_out.turned(rotation))
        if found < best.gain.after:
            best = Found(rotation, Gain(before, found, index))
    return best


def flattening_steps(rows: RotatedRows, rotation: torch.Tensor, bounds: Sequence[float]) -> Iterator[torch.Tensor]:
    """Yields a rotation after each round; the distance to the box of that round's bound never rises in it.

    A round takes as its target the rows clipped to the box, or, where that lowers the distance as well, a point beyond.

    Args:
        rows: the rows, with a mean square of 1.
        rotation: R at the start, `[blocks, size, size]`, orthogonal.
        bounds: largest magnitude of the box in each round.
    """
    push, turned = 1.0, rows.turned(rotation)
    for bound in bounds:
        before, clipped = distance_to_box(turned, bound), turned.clamp(-bound, bound)
        found = rows.nearest(torch.lerp(turned, clipped, push))
        moved = rows.turned(found)
        if push > 1 and distance_to_box(moved, bound) > before:
            push, found = 1.0, rows.nearest(clipped)
            moved = rows.turned(found)
        else:
            push = min(push * _PUSH, _FAR)
        rotation, turned = found, moved
        yield rotation


def _rounding_steps(rows: RotatedRows, rotation: torch.Tensor, rounding: Map, rounds: int) -> Iterator[torch.Tensor]:
    last = float("inf")
    for _ in range(rounds):
        turned = rows.turned(rotation)
        wanted = rounding(turned)
        error = _rounding_error(turned, wanted)
        if error > last * (1 - _SETTLED):
            return
        last = error
        rotation = rows.nearest(wanted)
        yield rotation


def _rounding_error(turned: torch.Tensor, rounded: torch.Tensor) -> float:
    """Mean squared error of a coordinate, of rows with a mean square of 1."""
    return float((rounded - turned).square().mean(dtype=torch.float64))
