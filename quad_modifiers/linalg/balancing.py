"""The transform in which rounding vectors with one step spoils their products with other vectors least."""

import torch

_RIDGE = 1e-2  # share of the mean of the diagonal that is added to it: no direction is without energy


def balanced_transform(states: torch.Tensor, readers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns T and its inverse, `[d, d]` each, float64, symmetric positive definite.

    A row vector k is rounded as k T, so its product with q has the error e T^-1 q^T. Errors e of one step for all
    coordinates, a share of the size of k T, make it tr(T S T) tr(T^-1 R T^-1) in the mean, for S and R the second
    moments of k and q. By the inequality of Cauchy and Schwarz that is least where T S T = T^-1 R T^-1, or T^2 is the
    geometric mean of S^-1 and R; so it is for T times any orthogonal matrix. Of its multiples this T is the one
    that leaves tr(S) as it is.

    Args:
        states: S, `[d, d]`, symmetric positive semi-definite.
        readers: R, likewise.

    Raises:
        ValueError: if either is not finite.
    """
    if not (torch.isfinite(states).all() and torch.isfinite(readers).all()):
        raise ValueError("the second moments of keys or queries are not finite")
    states, readers = _ridged(states), _ridged(readers)
    root, inverse_root = _power(states, 0.5), _power(states, -0.5)
    square = inverse_root @ _power(root @ readers @ root, 0.5) @ inverse_root
    factor = (states.trace() / (states @ square).trace()).sqrt()
    return _power(square, 0.5) * factor, _power(square, -0.5) / factor


def _ridged(moment: torch.Tensor) -> torch.Tensor:
    wide = moment.double()
    mean = wide.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return wide + _RIDGE * mean * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    """Of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    least = values[-1] * torch.finfo(torch.float64).eps  # rounding may leave less than nothing
    return (vectors * values.clamp(min=least) ** exponent) @ vectors.T
