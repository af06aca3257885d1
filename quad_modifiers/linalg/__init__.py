"""Linear algebra of the projection; imports torch and `quad_kernels` only."""

from quad_modifiers.linalg.balancing import balanced_factors, balanced_transform
from quad_modifiers.linalg.basis import extended_basis, outlier_basis, random_rotation, square_basis
from quad_modifiers.linalg.gram import StreamingGram

__all__ = [
    "StreamingGram",
    "balanced_factors",
    "balanced_transform",
    "extended_basis",
    "outlier_basis",
    "random_rotation",
    "square_basis",
]
