"""GPTQ (arXiv 2210.17323) around full-precision columns.

Columns are ordered [quantized | full precision]. Quantized columns are rounded one by one and each rounding error is
moved to the columns not yet processed. The full-precision outlier columns come last and are never rounded: they take
whatever error can still be undone by them, for free. Afterwards a few sweeps of exact coordinate descent on the same
quadratic loss revisit every rounding decision, with the outlier columns eliminated through their Schur complement.
"""

from dataclasses import dataclass

import torch

from quad_modifiers.quantization.grid import IntegerGrid, WeightScales, dequantize

MAX_DAMPING = 1.0


@dataclass
class GptqResult:
    """What `quantize_columns` returns.

    Attributes:
        integers: `[out, quantized]`, integer-valued float32.
        scales: scales per group, `[out, groups]`.
        outlier: `[out, n - quantized]`, float32, the full-precision columns after absorbing error.
        loss: `[out]`, (W - W_hat) H (W - W_hat)^T per output channel, the expected squared output error.
        damping: fraction of the mean residual diagonal that was added to the Hessian.
        attempts: Cholesky factorizations tried (more than one: the damping asked for was too small).
    """

    integers: torch.Tensor
    scales: WeightScales
    outlier: torch.Tensor
    loss: torch.Tensor
    damping: float
    attempts: int


def damp(hessian: torch.Tensor, quantized: int, damping: float) -> tuple[torch.Tensor, torch.Tensor, float, int]:
    """Returns the damped Hessian, the upper Cholesky factor of its inverse, the damping used, and the attempts.

    The damping is relative to the mean diagonal of the quantized columns (the outlier columns are far larger and
    would drown the rest). It grows tenfold while the factorization fails: in the extended basis the undamped Hessian
    is singular by construction.

    Raises:
        ValueError: if the Hessian is not finite or cannot be factorized with damping up to 1.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian has NaN or infinite entries")
    size = hessian.shape[0]
    identity = torch.eye(size, dtype=hessian.dtype, device=hessian.device)
    level = hessian.diagonal()[:quantized].mean()
    level = torch.where(level > torch.finfo(torch.float32).tiny, level, torch.ones_like(level))  # inputs all zero
    attempts = 0
    while damping <= MAX_DAMPING:
        attempts += 1
        damped = hessian + identity * (damping * level)
        # With J the reversal of the order, J H J = L L^T gives H^-1 = U^T U for the upper triangular U = J L^-1 J:
        # one factorization and one triangular solve instead of two factorizations and an inverse.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            # float64 for the factorization, which can fail; float32 for the solve, which only has to be accurate.
            factor = torch.linalg.solve_triangular(lower.float(), identity.float(), upper=False).flip(0, 1)
            if torch.isfinite(factor).all():
                return damped, factor, damping, attempts
        damping = max(damping * 10, 1e-4)
    raise ValueError(f"the Hessian cannot be factorized even with damping {MAX_DAMPING}; use more calibration text")


def _round_block(
    block: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, grid: IntegerGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds the columns of one block in order; `block` `[B, out]` (transposed: columns are contiguous) is consumed."""
    integers = torch.empty_like(block)
    errors = torch.empty_like(block)
    diagonal = factor.diagonal()
    for i in range(block.shape[0]):
        w = block[i]
        q = torch.addcdiv(zero[i], w, scale[i]).round_().clamp_(grid.low, grid.high)
        error = torch.addcmul(w, q - zero[i], scale[i], value=-1).div_(diagonal[i])
        integers[i], errors[i] = q, error
        if i + 1 < block.shape[0]:
            block[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
    return integers, errors


def quantize_columns(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    quantized: int,
    scales: WeightScales,
    grid: IntegerGrid,
    damping: float = 0.01,
    activation_order: bool = True,
    block_size: int = 128,
    sweeps: int = 0,
) -> GptqResult:
    """Rounds the first `quantized` columns of a weight, letting the rest absorb error.

    Args:
        weight: `[out, n]`, float32, columns [quantized | full precision].
        hessian: `[n, n]`, mean of x x^T over the inputs that the runtime will see, float32 or float64.
        quantized: number of leading columns to round.
        scales: scales per group of the quantized columns, `[out, groups]`.
        grid: the integer grid.
        damping: initial fraction of the mean diagonal added to the Hessian.
        activation_order: True to process columns by falling Hessian diagonal; groups keep their place (static groups).
        block_size: columns whose mutual updates are done at once.
        sweeps: coordinate-descent sweeps after GPTQ.

    Raises:
        ValueError: from `damp`, or if shapes disagree.
    """
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"the Hessian is {tuple(hessian.shape)}, the weight has {columns} columns")
    order = torch.arange(columns, device=weight.device)
    if activation_order:
        order[:quantized] = hessian.diagonal()[:quantized].argsort(descending=True, stable=True)
    damped, factor, damping, attempts = damp(hessian[order][:, order], quantized, damping)
    damped, factor = damped.to(weight), factor.to(weight)
    wide = scales.expand(quantized)
    scale_t = wide.scale[:, order[:quantized]].T.contiguous()
    zero_t = wide.zero_point[:, order[:quantized]].T.contiguous()
    work = weight[:, order].T.contiguous()  # [n, out]
    target = work.clone()
    integers = torch.empty_like(scale_t)
    for start in range(0, quantized, block_size):
        stop = min(start + block_size, quantized)
        integers[start:stop], errors = _round_block(
            work[start:stop].clone(), factor[start:stop, start:stop], scale_t[start:stop], zero_t[start:stop], grid
        )
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    transposed = WeightScales(scale_t, zero_t)
    if sweeps:
        reduced = _without_outliers(damped, quantized)
        for _ in range(sweeps):
            _descend(integers, transposed, target[:quantized], reduced, grid, block_size)
    delta = dequantize(integers, transposed) - target[:quantized]
    absorbed = _absorb(delta, damped, quantized)
    full_delta = torch.cat([delta, absorbed])
    loss = (full_delta * (hessian[order][:, order].to(weight) @ full_delta)).sum(0)
    inverse = order[:quantized].argsort()
    return GptqResult(
        integers.T[:, inverse].contiguous(),
        scales,
        (target[quantized:] + absorbed).T.contiguous(),
        loss,
        damping,
        attempts,
    )


def _outlier_response(hessian: torch.Tensor, quantized: int) -> torch.Tensor:
    """-H_oo^-1 H_oq, `[r, quantized]`: how the full-precision columns best follow a change of the quantized ones."""
    lower = torch.linalg.cholesky(hessian[quantized:, quantized:])
    half = torch.linalg.solve_triangular(lower, hessian[quantized:, :quantized], upper=False)
    return -torch.linalg.solve_triangular(lower.T, half, upper=True)


def _absorb(delta: torch.Tensor, hessian: torch.Tensor, quantized: int) -> torch.Tensor:
    """Change of the full-precision columns that minimizes the loss given the rounding errors, `[r, out]`."""
    if quantized == hessian.shape[0]:
        return delta[:0]
    return _outlier_response(hessian, quantized) @ delta


def _without_outliers(hessian: torch.Tensor, quantized: int) -> torch.Tensor:
    """Schur complement: the loss as a function of the quantized columns, the others always following optimally."""
    corner = hessian[:quantized, :quantized]
    if quantized == hessian.shape[0]:
        return corner
    return corner + hessian[:quantized, quantized:] @ _outlier_response(hessian, quantized)


def _descend(
    integers: torch.Tensor,
    scales: WeightScales,
    target: torch.Tensor,
    hessian: torch.Tensor,
    grid: IntegerGrid,
    block_size: int,
) -> None:
    """One sweep of coordinate descent over the integers, in place; tensors are `[n, out]` (transposed)."""
    columns = integers.shape[0]
    gradient = hessian @ (dequantize(integers, scales) - target)
    step = hessian.diagonal().unsqueeze(1) * scales.scale
    # A group of zeros has the smallest scale there is; it stays as it is.
    inverse_step = torch.where(step > torch.finfo(step.dtype).tiny, 1.0 / step, 0.0)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        local = gradient[start:stop].clone()
        change = torch.empty_like(local)
        for i in range(stop - start):
            j = start + i
            q = integers[j]
            best = torch.addcmul(q, local[i], inverse_step[j], value=-1).round_().clamp_(grid.low, grid.high)
            change[i] = (best - q) * scales.scale[j]
            integers[j] = best
            if i + 1 < stop - start:
                local[i + 1 :].addr_(hessian[start + i + 1 : stop, j], change[i])
        gradient.addmm_(hessian[:, start:stop], change)
