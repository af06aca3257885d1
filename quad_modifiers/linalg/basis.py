"""Bases of the residual stream: the outlier subspace first, a rotation of what is left after it.

With P the top-r eigenvectors of the activation Gram matrix (QUAD, arXiv 2503.19353, section 3), activations x become
x Q and weights W (out x in) become W Q, which leaves W x unchanged because Q Q^T = I. The derivations are in
docs/concepts/projection.md.
"""

from typing import Literal

import torch
from quad_kernels.hadamard import hadamard_matrix, is_hadamard_order

Rotation = Literal["hadamard", "random", "none"]


def outlier_basis(gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the top eigenvectors of a Gram matrix and an orthonormal basis of their complement.

    Eigenvectors are float64, sorted by falling eigenvalue, and signed so that the largest entry is positive: the
    result does not depend on the eigensolver's sign choices.

    Args:
        gram: `[d, d]`, symmetric positive semi-definite.
        rank: r, 0 <= r < d.

    Returns:
        P `[d, r]` and its complement `[d, d - r]`, float64.

    Raises:
        ValueError: if `rank` is out of range or `gram` is not finite.
    """
    size = gram.shape[0]
    if not 0 <= rank < size:
        raise ValueError(f"rank ({rank}) must be at least 0 and smaller than hidden_size ({size}); choose 16 to 128")
    if not torch.isfinite(gram).all():
        raise ValueError("the Gram matrix of the calibration activations is not finite")
    vectors = torch.linalg.eigh(gram.to(torch.float64)).eigenvectors.flip(-1)
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    vectors = vectors * torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0)
    return vectors[:, :rank].contiguous(), vectors[:, rank:].contiguous()


def random_rotation(size: int, rotation: Rotation, generator: torch.Generator) -> torch.Tensor:
    """Returns an orthogonal matrix, `[size, size]`, float64.

    `hadamard` is a Hadamard matrix with random row signs; for a size without a known Hadamard order it is a random
    orthogonal matrix (offline rotations may be any). `random` is Haar distributed, `none` the identity.
    """
    if rotation == "none" or size == 0:
        return torch.eye(size, dtype=torch.float64)
    if rotation == "hadamard" and is_hadamard_order(size):
        signs = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
        return hadamard_matrix(size) * signs
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * torch.sign(torch.diagonal(r))


def extended_basis(outliers: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Returns Q = [P | (I - P P^T) R], `[d, d + r]`, with Q Q^T = I (QUAD, section 3.2).

    Args:
        outliers: P, `[d, r]`, orthonormal columns.
        rotation: R, `[d, d]`, orthogonal; brought to the device of P.
    """
    rotation = rotation.to(outliers.device)
    return torch.cat([outliers, rotation - outliers @ (outliers.T @ rotation)], dim=1)


def square_basis(
    outliers: torch.Tensor, complement: torch.Tensor, rotation: torch.Tensor, outlier_rotation: torch.Tensor
) -> torch.Tensor:
    """Returns Q = [P R_1 | P_perp R_2], `[d, d]`, orthogonal (the layout of ResQ, arXiv 2412.14363).

    Args:
        outliers: P, `[d, r]`.
        complement: P_perp, `[d, d - r]`.
        rotation: R_2, `[d - r, d - r]`.
        outlier_rotation: R_1, `[r, r]`. Both rotations are brought to the device of P.
    """
    device = outliers.device
    return torch.cat([outliers @ outlier_rotation.to(device), complement @ rotation.to(device)], dim=1)
