"""4-bit entries of a key/value cache: one asymmetric grid per token and head."""

from typing import NamedTuple

import torch

from quad_kernels import ops

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class KVEntries(NamedTuple):
    """Quantized vectors.

    Attributes:
        integers: 0 to 15, `[..., head_dim / 2]`, uint8: byte j holds coordinate j in its low four bits and coordinate
            head_dim / 2 + j in its high four.
        scale: distance of two grid points, `[...]`.
        zero: value of the integer 0, `[...]`.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def quantize_kv(
    x: torch.Tensor,
    *,
    clip_ratio: float = 1.0,
    scale_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> KVEntries:
    """Rounds each vector of `head_dim` coordinates to 16 equidistant points between its extremes.

    Scale and zero are rounded to `scale_dtype` first, the integers are those of the rounded grid.

    Args:
        x: keys or values, `[..., head_dim]`, floating point.
        clip_ratio: share of the span between smallest and largest coordinate that the grid covers, about its middle.
        scale_dtype: float16, bfloat16 or float32; by default that of `x`. float16 holds spans up to 15 * 65504.
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        Integers, scales and zeros. A vector that holds NaN or an infinity, or whose span overflows float32, gets scale
        and zero NaN; one whose scale overflows `scale_dtype` is NaN after `dequantize_kv`.

    Raises:
        ValueError: for an odd `head_dim`, or a `scale_dtype` or `clip_ratio` that is not supported.
    """
    head_dim = x.shape[-1]
    scale_dtype = scale_dtype or x.dtype
    if head_dim % 2 or not head_dim:
        raise ValueError(f"head_dim ({head_dim}) must be even and positive: two coordinates share a byte")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype ({scale_dtype}) must be one of {', '.join(map(str, SCALE_DTYPES))}")
    if not 0 < clip_ratio <= 1:
        raise ValueError(f"clip_ratio ({clip_ratio}) must lie in (0, 1]")
    integers, scale, zero = ops.quantize_kv(x.reshape(-1, head_dim), clip_ratio, scale_dtype, backend or "")
    leading = x.shape[:-1]
    return KVEntries(integers.view(*leading, head_dim // 2), scale.view(leading), zero.view(leading))


def dequantize_kv(entries: KVEntries, dtype: torch.dtype, *, backend: str | None = None) -> torch.Tensor:
    """Returns `integers * scale + zero`, computed in float32, as `[..., head_dim]` of `dtype`.

    Raises:
        ValueError: if the shapes do not fit.
    """
    integers, scale, zero = entries
    if scale.shape != integers.shape[:-1] or zero.shape != scale.shape:
        raise ValueError(
            f"integers {list(integers.shape)} need one scale and one zero per vector, got {list(scale.shape)} and "
            f"{list(zero.shape)}"
        )
    x = ops.dequantize_kv(
        integers.reshape(-1, integers.shape[-1]), scale.reshape(-1), zero.reshape(-1), dtype, backend or ""
    )
    return x.view(*scale.shape, 2 * integers.shape[-1])


__all__ = ["KVEntries", "dequantize_kv", "quantize_kv"]
