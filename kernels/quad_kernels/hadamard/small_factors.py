"""Hadamard transform on the CPU: small factors, multiplied without moving the data between them.

Sylvester's matrices are Kronecker products of each other, so a power of two can be split as it suits the processor:
(16, 16, 32) takes a third of the arithmetic of (128, 64). A factor that is not the last one multiplies its axis from
the left, which needs no transposed copy. Sums come in another order than in the reference: results differ by the
rounding of float32 sums.
"""

from functools import cache

import torch

from quad_kernels.hadamard import reference
from quad_kernels.hadamard.construct import HadamardPlan, hadamard_factor

_LARGEST_LOG2 = 6  # of a factor that is a power of two


def apply_hadamard(x: torch.Tensor, plan: HadamardPlan) -> torch.Tensor:
    """See `quad_kernels.apply_hadamard`; without gradients."""
    if x.dtype == torch.float64:
        return reference.apply_hadamard(x, plan)
    return transform(x.to(torch.float32), plan).to(x.dtype)


def transform(x: torch.Tensor, plan: HadamardPlan) -> torch.Tensor:
    """The transform of float32 numbers, `[..., plan.size]`, not rounded to another dtype."""
    factors = split_factors(plan.factors)
    inner = factors[-1]
    with torch.autocast("cpu", enabled=False):
        y = x.reshape(-1, inner) @ hadamard_factor(inner, torch.float32, x.device)
        for order in reversed(factors[:-1]):
            y = torch.matmul(hadamard_factor(order, torch.float32, x.device).T, y.view(-1, order, inner))
            inner *= order
    return y.view(x.shape)


@cache
def split_factors(factors: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the orders of the same Kronecker product with its powers of two split evenly, the smaller first."""
    log2 = sum(order.bit_length() - 1 for order in factors if order & (order - 1) == 0)
    others = tuple(order for order in factors if order & (order - 1))
    count = -(-log2 // _LARGEST_LOG2)
    powers = tuple(2 ** ((log2 + i) // count) for i in range(count))
    return (others + powers) or (1,)
