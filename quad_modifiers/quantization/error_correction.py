"""Weights that make up for the error of earlier layers: how far, and how cautiously.

The correction D = W E[(x_original - x_seen) x_seen^T] (E[x_seen x_seen^T] + ridge)^-1 is estimated from a sample, and
its cross moments are small differences: taken in full it fits the sample. Half of the tokens says what the correction
is worth that the other half suggests. Its expected error on them, share^2 tr(D H D^T) - 2 share tr(D C^T W^T) with
their moments H and C, has its least value in closed form.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from quad_modifiers.quantization.gptq import factorizations, input_level
from quad_modifiers.ranks import ranks

_RIDGES = (0.01, 0.1, 1.0, 10.0)  # fractions of the level of the inputs
_ROWS = 256  # of the weight, spread over it, that the choice is made by


class Moments(NamedTuple):
    """What a sample says of the inputs of a group of linears.

    Attributes:
        hessian: mean of x_seen x_seen^T, `[n, n]`, float64.
        drift: mean of (x_original - x_seen) x_seen^T, `[n, n]`, float64.
    """

    hessian: torch.Tensor
    drift: torch.Tensor


class Correction(NamedTuple):
    """How a weight is corrected.

    Attributes:
        share: part of the correction that is taken, 0 to 1.
        ridge: what is added to the Hessian, as a fraction of the level of the inputs.
    """

    share: float
    ridge: float


def corrected(weight: torch.Tensor, moments: Moments, columns: int, correction: Correction) -> torch.Tensor:
    """Returns the weight that best reproduces the original model's output from the quantized model's input.

    argmin_V E |W x_original - V x_seen|^2 = W + W E[(x_original - x_seen) x_seen^T] E[x_seen x_seen^T]^-1, damped, and
    taken only in part, because the moments come from a sample.

    Args:
        weight: `[out, n]`, float32, residual columns first.
        moments: of its inputs.
        columns: number of residual columns.
        correction: share and ridge.
    """
    change = _change(weight, moments, columns, correction.ridge) if correction.share else None
    return weight if change is None else weight + correction.share * change


def cross_fitted(weight: torch.Tensor, halves: Sequence[Moments], columns: int) -> Correction:
    """Returns the share and the ridge of least expected error on the half of a sample that they were not made from.

    Args:
        weight: `[out, n]`, float32, residual columns first.
        halves: moments of both halves.
        columns: number of residual columns.
    """
    rows = weight[:: max(1, len(weight) // _ROWS)]

    def gain_and_cost(ridge: float) -> tuple[float, float]:
        gain = cost = 0.0
        for made, other in zip(halves, reversed(halves), strict=True):
            change = _change(rows, made, columns, ridge)
            if change is not None:
                gain += float((change * (rows @ other.drift.to(rows))).sum())
                cost += float(((change @ other.hessian.to(rows)) * change).sum())
        return gain, cost

    best, least = Correction(0.0, _RIDGES[-1]), 0.0
    for ridge, (gain, cost) in zip(_RIDGES, ranks().each(_RIDGES, gain_and_cost), strict=True):
        share = min(1.0, max(0.0, gain / cost)) if cost > 0 else 0.0
        error = share * (share * cost - 2 * gain)
        if error < least:
            best, least = Correction(share, ridge), error
    return best


def _change(weight: torch.Tensor, moments: Moments, columns: int, ridge: float) -> torch.Tensor | None:
    """The whole correction, `[out, n]`; None if it cannot be computed, or fits rounding errors of inputs alike."""
    # Outliers first: the other way round, what is left of them after many small columns is rounding error in float32.
    right = (weight @ moments.drift.to(weight)).flip(1).T
    for found in factorizations(moments.hessian.flip(0, 1), input_level(moments.hessian, columns), ridge):
        lower = found.lower.to(weight)
        half = torch.linalg.solve_triangular(lower, right, upper=False)
        change = torch.linalg.solve_triangular(lower.T, half, upper=True).T.flip(1)
        if change.norm() <= weight.norm():  # not if NaN
            return change
    return None
