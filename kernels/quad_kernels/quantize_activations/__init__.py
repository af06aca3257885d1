"""Dynamic symmetric integer quantization of activations, with what comes before it in a QUAD layer."""

from typing import NamedTuple

import torch

from quad_kernels import ops
from quad_kernels.formats import InputQuantization, InputSplit, RMSNorm


class QuantizedActivations(NamedTuple):
    """A split and quantized input.

    Attributes:
        outlier: full-precision coordinates, `[..., rank]`, dtype of the input; None for rank 0.
        integers: `[..., n]`, int8, or packed in bytes, `[..., nibble_bytes(n)]`, uint8.
        scale: `[..., groups]`, float32.
    """

    outlier: torch.Tensor | None
    integers: torch.Tensor
    scale: torch.Tensor


def quantize_activations(
    x: torch.Tensor,
    quantization: InputQuantization,
    split: InputSplit | None = None,
    *,
    norm: RMSNorm | None = None,
    packed: bool = False,
    backend: str | None = None,
) -> QuantizedActivations:
    """Normalises (if asked), splits off the outliers, transforms and quantizes the rest, in one pass where possible.

    Each token (or each group of a token) gets its own symmetric grid: scale = clip_ratio * absmax / ((2^bits - 1) / 2),
    integers from -2^(bits-1) to 2^(bits-1) - 1, round to nearest even. A clip ratio of 1 is the grid of
    compressed-tensors; the "0.9 of absmax / 7" of the QUAD paper (section 4.1) is 0.964 here.

    Args:
        x: `[..., width]`, float32, bfloat16 or float16.
        quantization: bits, clip ratio and group size; a group size divides the residual width.
        split: how `x` is divided; None quantizes all of it.
        norm: computed on `x` first; its output is rounded to the dtype of `x`, as a separate norm would.
        packed: return 4-bit integers packed (`quad_kernels.packing.nibbles` has the order).
        backend: name of a backend; by default the environment variable QUAD_KERNELS or the best for the device.

    Returns:
        Outliers, integers and scales. A zero token gets scale 0 and integers 0, and so does one whose scale is no
        normal float32.

    Raises:
        ValueError: for a group size that does not divide the residual, a width that is not the split's, or `packed`
            with more than 4 bits.
    """
    width = x.shape[-1]
    split = InputSplit(width) if split is None else split
    if width != split.width:
        raise ValueError(f"the input has {width} coordinates, its split is for {split.width}")
    group = quantization.group_size
    if group is not None and split.residual_width % group:
        raise ValueError(f"group_size ({group}) must divide the width of the activations ({split.residual_width})")
    if packed and quantization.bits > 4:
        raise ValueError(f"only integers of up to 4 bits can be packed, not {quantization.bits}")
    outlier, integers, scale = ops.quantize_activations(
        x.reshape(-1, width),
        quantization.bits,
        quantization.clip_ratio,
        group or 0,
        split.outliers,
        split.block,
        split.keep_width,
        split.hadamard,
        None if norm is None else norm.weight,
        -1.0 if norm is None else norm.eps,
        packed,
        backend or "",
    )
    leading = x.shape[:-1]
    return QuantizedActivations(
        outlier.view(*leading, split.rank) if split.rank else None,
        integers.view(*leading, integers.shape[-1]),
        scale.view(*leading, scale.shape[-1]),
    )


__all__ = ["InputQuantization", "InputSplit", "QuantizedActivations", "RMSNorm", "quantize_activations"]
