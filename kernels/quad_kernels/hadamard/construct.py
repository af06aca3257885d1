"""Hadamard matrices from Sylvester's and Paley's constructions, computed instead of tabulated.

A Hadamard matrix of order n has entries +-1 and satisfies H H^T = n I. Known small orders come from

* Sylvester: order 2^k;
* Paley I: order q + 1 for a prime power q = 3 (mod 4);
* Paley II: order 2 (q + 1) for a prime power q = 1 (mod 4);
* Kronecker products of the above.

(R. E. A. C. Paley, "On orthogonal matrices", 1933.) That covers the intermediate sizes of the supported model
families, 11008 = 344 * 32 and 18944 = 148 * 128 included.
"""

from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import torch

MAX_DENSE_ORDER = 512  # largest factor applied as a dense matrix; larger ones would dominate the run time


@dataclass(frozen=True)
class HadamardPlan:
    """How a transform of `size` coordinates is carried out.

    Attributes:
        size: number of coordinates transformed.
        block: the transform is block diagonal with blocks of this size (`block == size`: one full Hadamard).
        factors: Kronecker factors of one block, each a Hadamard order; their product is `block`.
    """

    size: int
    block: int
    factors: tuple[int, ...]

    @property
    def kind(self) -> str:
        """`full` if every input reaches every output, `block` if the size has no known Hadamard order."""
        return "full" if self.block == self.size else "block"


def _prime_power(q: int) -> tuple[int, int] | None:
    """Returns (p, k) with q == p**k and p prime, or None."""
    for p in range(2, int(q**0.5) + 1):
        if q % p == 0:
            k, rest = 0, q
            while rest % p == 0:
                rest //= p
                k += 1
            return (p, k) if rest == 1 else None
    return (q, 1) if q > 1 else None


def _poly_multiply(a: tuple[int, ...], b: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    """Product in GF(p)[x] / modulus; polynomials are coefficient tuples, lowest degree first, modulus monic."""
    k = len(modulus) - 1
    out = [0] * (2 * k - 1)
    for i, ai in enumerate(a):
        for j, bj in enumerate(b):
            out[i + j] = (out[i + j] + ai * bj) % p
    for degree in range(2 * k - 2, k - 1, -1):
        lead = out[degree]
        for j in range(k + 1):
            out[degree - k + j] = (out[degree - k + j] - lead * modulus[j]) % p
    return tuple(out[:k])


def _nonzero_squares(p: int, k: int) -> tuple[list[tuple[int, ...]], set[tuple[int, ...]]]:
    """All elements of GF(p^k) and the set of its non-zero squares."""
    elements = [tuple(reversed(e)) for e in product(range(p), repeat=k)]
    zero = (0,) * k
    for tail in product(range(p), repeat=k):
        modulus = (*tail, 1)
        squares = {_poly_multiply(e, e, modulus, p) for e in elements if e != zero}
        # A field has exactly (q - 1) / 2 non-zero squares and no zero divisors.
        if zero not in squares and len(squares) == (p**k - 1) // 2 and _is_field(elements, modulus, p):
            return elements, squares
    raise AssertionError(f"no irreducible polynomial of degree {k} over GF({p})")  # one always exists


def _is_field(elements: list[tuple[int, ...]], modulus: tuple[int, ...], p: int) -> bool:
    """True if the quotient ring has no zero divisors (checked against every monic factor candidate)."""
    k = len(modulus) - 1
    zero = (0,) * k
    small = [e for e in elements if any(e) and not any(e[k // 2 + 1 :])]
    return all(_poly_multiply(a, b, modulus, p) != zero for a in small for b in elements if b != zero)


def _jacobsthal(q: int) -> torch.Tensor:
    """Jacobsthal matrix J[i, j] = chi(a_i - a_j) of GF(q), `[q, q]`, int64."""
    found = _prime_power(q)
    assert found is not None
    p, k = found
    if k == 1:
        chi = torch.full((q,), -1, dtype=torch.int64)
        chi[torch.arange(1, q) ** 2 % q] = 1
        chi[0] = 0
        index = torch.arange(q)
        return chi[(index[:, None] - index[None, :]) % q]
    elements, squares = _nonzero_squares(p, k)
    rows = []
    for a in elements:
        differences = [tuple((x - y) % p for x, y in zip(a, b, strict=True)) for b in elements]
        rows.append([0 if not any(d) else (1 if d in squares else -1) for d in differences])
    return torch.tensor(rows, dtype=torch.int64)


def _paley_q(order: int) -> tuple[int, int] | None:
    """Returns (construction, q) for a Paley matrix of this order, or None."""
    if _prime_power(order - 1) is not None and (order - 1) % 4 == 3:
        return 1, order - 1
    half = order // 2 - 1
    if order % 2 == 0 and half > 1 and half % 4 == 1 and _prime_power(half) is not None:
        return 2, half
    return None


def _paley(order: int) -> torch.Tensor:
    found = _paley_q(order)
    assert found is not None
    construction, q = found
    jacobsthal = _jacobsthal(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    core[0, 1:] = 1
    core[1:, 0] = -1 if construction == 1 else 1
    core[1:, 1:] = jacobsthal
    identity = torch.eye(q + 1, dtype=torch.int64)
    if construction == 1:
        return core + identity
    plus = torch.tensor([[1, 1], [1, -1]])
    diagonal = torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(core, plus) + torch.kron(identity, diagonal)


@cache
def _factorize(n: int) -> tuple[int, ...] | None:
    """Hadamard orders whose product is n, each at most MAX_DENSE_ORDER, or None.

    The smallest Paley order that holds the odd part of n comes first, then balanced powers of two.
    """
    power = n & -n
    odd = n // power
    if odd == 1:
        return _split_power_of_two(n)
    best: tuple[int, ...] | None = None
    for shift in range(2, power.bit_length()):
        order = odd << shift
        if order > MAX_DENSE_ORDER:
            break
        if _paley_q(order) is not None:
            rest = n // order
            best = (order, *_split_power_of_two(rest)) if rest > 1 else (order,)
            break
    return best or _two_paley_factors(n)


def _split_power_of_two(n: int) -> tuple[int, ...]:
    if n <= 128:
        return (n,)
    half = 1 << ((n.bit_length() - 1 + 1) // 2)
    return (*_split_power_of_two(half), *_split_power_of_two(n // half))


def _two_paley_factors(n: int) -> tuple[int, ...] | None:
    for order in range(4, MAX_DENSE_ORDER + 1, 4):
        if n % order == 0 and order & (order - 1) and _paley_q(order) is not None and n // order > 1:
            rest = _factorize(n // order)
            if rest is not None:
                return (order, *rest)
    return None


def is_hadamard_order(n: int) -> bool:
    """True if a Hadamard matrix of order `n` can be built here."""
    return n in (1, 2) or (n > 0 and n % 4 == 0 and _factorize(n) is not None)


@cache
def plan_hadamard(size: int) -> HadamardPlan:
    """Returns the transform for `size` coordinates: a full Hadamard, else the largest known block.

    Raises:
        ValueError: if `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"a Hadamard transform needs a positive size, got {size}")
    if size == 1:
        return HadamardPlan(1, 1, (1,))
    block = next(b for b in range(size, 0, -1) if size % b == 0 and is_hadamard_order(b))
    factors = _factorize(block) if block > 2 else (block,)
    assert factors is not None
    return HadamardPlan(size, block, factors)


@lru_cache(maxsize=32)
def _small_hadamard(order: int) -> torch.Tensor:
    if order & (order - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.int64)
        while matrix.shape[0] < order:
            matrix = torch.kron(torch.tensor([[1, 1], [1, -1]]), matrix)
        return matrix
    return _paley(order)


@lru_cache(maxsize=64)
def hadamard_factor(order: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns one dense factor scaled to be orthonormal, `[order, order]`; cached, not to be written to."""
    with torch.inference_mode(False), torch.device("cpu"):  # a cached tensor outlives the mode of its first caller
        return (_small_hadamard(order).to(torch.float64) / order**0.5).to(device=device, dtype=dtype)


def hadamard_matrix(size: int) -> torch.Tensor:
    """Returns the orthonormal transform of `plan_hadamard(size)` as a matrix, `[size, size]`, float64.

    `apply_hadamard(x, plan)` equals `x @ hadamard_matrix(size)`.
    """
    plan = plan_hadamard(size)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for order in plan.factors:
        matrix = torch.kron(matrix, hadamard_factor(order, torch.float64, torch.device("cpu")))
    return torch.block_diag(*[matrix] * (size // plan.block))
