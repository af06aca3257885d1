"""The rounding of weights, for compression: no layer needs it at run time."""

import torch

from quad_kernels.backends import choose_backend


def round_columns(
    columns: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    *,
    low: int,
    high: int,
    e2m1: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds weight columns one after the other; those behind each take up its error (GPTQ, arXiv 2210.17323).

    Column i becomes q = clamp(round(w / scale + zero_point)), its error is e_i = (w - (q - zero_point) scale) /
    factor[i, i], and each later column j loses factor[i, j] e_i before it is rounded itself.

    Args:
        columns: weights, `[n, out]`, float32, a column of the weight in each row; they stay as they are.
        factor: upper triangular Cholesky factor of the inverse Hessian for these columns, `[n, n]`, float32.
        scale: `[n, out]`, float32, positive.
        zero_point: `[n, out]`, float32, integer-valued.
        low: smallest integer.
        high: largest integer.
        e2m1: True rounds to doubled 4-bit floating-point numbers instead of all integers (`quad_kernels.float4`).
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        The integers and the errors, `[n, out]` each, float32.

    Raises:
        ValueError: if a shape or dtype does not fit.

    Example:
        >>> factor = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
        >>> ones, zeros = torch.ones(2, 1), torch.zeros(2, 1)
        >>> integers, errors = round_columns(torch.tensor([[1.4], [2.6]]), factor, ones, zeros, low=-8, high=7)
        >>> integers.tolist()  # the error of 0.4 takes 0.2 from the second column
        [[1.0], [2.0]]
    """
    _check_columns(columns, factor, scale, zero_point)
    run = choose_backend(columns.device, backend).round_columns
    return run(columns, factor, scale, zero_point, low, high, e2m1)


def descend_columns(
    integers: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    inverse_step: torch.Tensor,
    *,
    low: int,
    high: int,
    e2m1: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves each integer to where a quadratic loss is least while the others stay, one column after the other.

    Args:
        integers: `[n, out]`, integer-valued float32; they stay as they are.
        gradient: half of the derivative of the loss by the dequantized weights, `[n, out]`, float32.
        hessian: `[n, n]`, float32, symmetric; a change of column i adds hessian[i, j] times it to the gradient of j.
        scale: `[n, out]`, float32.
        inverse_step: 1 / (hessian[i, i] scale), `[n, out]`, float32; 0 where an integer shall stay.
        low: smallest integer.
        high: largest integer.
        e2m1: True rounds to doubled 4-bit floating-point numbers instead of all integers (`quad_kernels.float4`).
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        The integers and the changes of the dequantized weights, `[n, out]` each, float32.

    Raises:
        ValueError: if a shape or dtype does not fit.

    Example:
        >>> hessian, target = torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.2], [2.0]])
        >>> integers, scale = torch.tensor([[2.0], [1.0]]), torch.ones(2, 1)
        >>> gradient = hessian @ (integers * scale - target)
        >>> moved, change = descend_columns(integers, gradient, hessian, scale, scale / 2, low=-8, high=7)
        >>> moved.tolist()  # the second one moves
        [[2.0], [2.0]]
    """
    _check_columns(integers, hessian, gradient, scale, inverse_step)
    run = choose_backend(integers.device, backend).descend_columns
    return run(integers, gradient, hessian, scale, inverse_step, low, high, e2m1)


def rounding_errors(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    cost: torch.Tensor,
    *,
    low: int,
    high: int,
    e2m1: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Returns what rounding a weight with each of several scales would cost: the sum of cost (w - w_hat)^2.

    w_hat = (q - zero_point) scale with q = clamp(round(w / scale + zero_point)), for the columns of a group together.

    Args:
        weight: `[out, in]`, float32.
        scale: scales to try, `[trials, out, groups]`, float32, positive; groups must divide in.
        zero_point: likewise, integer-valued.
        cost: what the squared error of each input costs, `[in]`, float32.
        low: smallest integer.
        high: largest integer.
        e2m1: True rounds to doubled 4-bit floating-point numbers instead of all integers (`quad_kernels.float4`).
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        `[trials, out, groups]`, float32.

    Raises:
        ValueError: if a shape or dtype does not fit.

    Example:
        >>> weight, trials = torch.tensor([[1.0, 2.0, 3.5]]), torch.tensor([1.0, 0.5]).reshape(2, 1, 1)
        >>> rounding_errors(weight, trials, torch.zeros(2, 1, 1), torch.ones(3), low=-8, high=7).flatten()
        tensor([0.2500, 0.0000])
    """
    out, width = weight.shape if weight.ndim == 2 else (-1, -1)
    fits = scale.ndim == 3 and scale.shape[1] == out and scale.shape[2] > 0 and width % scale.shape[2] == 0
    if not fits or zero_point.shape != scale.shape or cost.shape != (width,):
        shapes = [list(each.shape) for each in (weight, scale, zero_point, cost)]
        raise ValueError(f"weight [out, in], scale and zero_point [trials, out, groups], cost [in], not {shapes}")
    if any(each.dtype != torch.float32 for each in (weight, scale, zero_point, cost)):
        raise ValueError("weight, scale, zero_point and cost must be float32")
    run = choose_backend(weight.device, backend).rounding_errors
    return run(weight, scale, zero_point, cost, low, high, e2m1)


def _check_columns(columns: torch.Tensor, square: torch.Tensor, *alike: torch.Tensor) -> None:
    count = len(columns)
    if columns.ndim != 2 or square.shape != (count, count) or any(each.shape != columns.shape for each in alike):
        shapes = [list(each.shape) for each in (columns, square, *alike)]
        raise ValueError(f"columns must be [n, out], the square matrix [n, n], the rest like the columns, not {shapes}")
    if any(each.dtype != torch.float32 for each in (columns, square, *alike)):
        raise ValueError("columns and what belongs to them must be float32")
