"""The transform in which rounding vectors with one step spoils their products with other vectors least.

A row vector x is rounded as x T, so its product with w has the error e T^-1 w^T. Errors e of one step for all
coordinates, a share of the size of x T, make it tr(T^T S T) tr(T^-1 R T^-T) in the mean, for S and R the second moments
of x and w. docs/concepts/projection.md derives which T makes that least.
"""

import math

import torch

_RIDGE = 1e-2  # share of the mean of the diagonal that is added to it: no direction is without energy
_CAP = 8.0  # largest and smallest factor of a coordinate, over their geometric mean


def balanced_transform(states: torch.Tensor, readers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns T and its inverse, `[..., d, d]` each, float64, symmetric positive definite.

    The cost is least where T S T = T^-1 R T^-1, or T^2 is the geometric mean of S^-1 and R; so it is for T times any
    orthogonal matrix. Several are the blocks of one T: what they round shares a step. Of all multiples this T is the
    one that leaves tr(S), over all blocks, as it is.

    Args:
        states: S, `[..., d, d]`, symmetric positive semi-definite.
        readers: R, likewise.

    Raises:
        ValueError: if either is not finite.
    """
    _check_finite(states, readers)
    states, readers = _ridged(states), _ridged(readers)
    root, inverse_root = _power(states, 0.5), _power(states, -0.5)
    square = inverse_root @ _power(root @ readers @ root, 0.5) @ inverse_root
    factor = (_trace(states).sum() / _trace(states @ square).sum()).sqrt()
    return _power(square, 0.5) * factor, _power(square, -0.5) / factor


def balanced_factors(states: torch.Tensor, readers: torch.Tensor) -> torch.Tensor:
    """Returns the diagonal T of least cost, `[d]`, float64, positive: t^4 = R / S, within bounds.

    Of all multiples it is the one that leaves the sum of S as it is.

    Args:
        states: diagonal of S, `[d]`, not negative.
        readers: diagonal of R, likewise.

    Raises:
        ValueError: if either is not finite.
    """
    _check_finite(states, readers)
    states, readers = _floored(states), _floored(readers)
    logarithm = (readers / states).log() / 4
    bound = math.log(_CAP)
    factors = (logarithm - logarithm.mean()).clamp(-bound, bound).exp()
    return factors * (states.sum() / (states * factors.square()).sum()).sqrt()


def _check_finite(*moments: torch.Tensor) -> None:
    if not all(torch.isfinite(each).all() for each in moments):
        raise ValueError("a second moment of what is rounded, or of what reads it, is not finite")


def _trace(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def _ridged(moment: torch.Tensor) -> torch.Tensor:
    wide = moment.double()
    size = wide.shape[-1]
    mean = (_trace(wide) / size).clamp(min=torch.finfo(torch.float32).tiny)
    return wide + _RIDGE * mean[..., None, None] * torch.eye(size, dtype=wide.dtype, device=wide.device)


def _floored(energies: torch.Tensor) -> torch.Tensor:
    wide = energies.double()
    return wide + _RIDGE * wide.mean().clamp(min=torch.finfo(torch.float32).tiny)


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """Of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    least = values[..., -1:] * torch.finfo(torch.float64).eps  # rounding may leave less than nothing
    return (vectors * values.maximum(least).unsqueeze(-2) ** exponent) @ vectors.mT
