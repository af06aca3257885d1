"""4-bit floating-point numbers (e2m1) in groups with a scale: NVFP4 and MXFP4.

The numbers are 0, 0.5, 1, 1.5, 2, 3, 4 and 6, with a sign (OCP Microscaling Formats 1.0, section 5.3.3). Twice a number
is an integer of at most 12, so sums of products are exact in integers: here, and in all kernels, a number is stored as
that integer, and its scale as half of what the format stores.

A group of NVFP4 is 16 numbers with a scale of 4 significant bits (e4m3, times one float32 per tensor, a power of two
here), one of MXFP4 is 32 numbers with a scale that is a power of two (e8m0).
"""

import math
from typing import Literal

import torch

NumberFormat = Literal["int", "nvfp4", "mxfp4"]

GROUP_SIZES = {"nvfp4": 16, "mxfp4": 32}
LARGEST = 12  # twice 6
INTEGER_BITS = 5  # that hold it
MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)  # by code, doubled; bit 3 of a code is the sign

_LARGEST_E4M3, _SMALLEST_E4M3 = 448.0, 2.0**-9
_BIAS_E8M0 = 127
_SIGNIFICAND_4 = ~((1 << 20) - 1)  # of a float32, the bits of a number of 4 significant ones


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Returns the nearest doubled numbers, half to even, of `x`, which it writes over; beyond 12 it is 12.

    Example:
        >>> round_e2m1(torch.tensor([0.5, 2.5, 5.0, 7.1, -9.0, 100.0]))
        tensor([ 0.,  2.,  4.,  8., -8., 12.])
    """
    x = x.clamp_(-LARGEST, LARGEST)
    magnitude = x.abs()
    unit = 1 + (magnitude >= 4).to(x.dtype) + 2 * (magnitude >= 8).to(x.dtype)
    return x.div_(unit).round_().mul_(unit)


def input_scale(largest: torch.Tensor, number_format: str, top: int = LARGEST) -> torch.Tensor:
    """Returns the scales of doubled numbers for groups by their largest magnitude, float32, any shape.

    NVFP4: the largest magnitude over `top`, a doubled number, rounded to 4 significant bits, half to even: e4m3 without
    its limits. MXFP4: the power of two for which the largest magnitude is 3.5 to 7, as compressed-tensors has it.

    Example:
        >>> input_scale(torch.tensor([6.0, 6.5, 7.0]), "mxfp4").tolist()
        [0.5, 0.5, 1.0]
        >>> input_scale(torch.tensor([6.0, 6.5]), "nvfp4").tolist()
        [0.5, 0.5625]
    """
    if number_format == "mxfp4":
        bits = (largest.view(torch.int32) + (1 << 21)) & 0x7F800000  # a significand from 1.75 on is rounded up
        return bits.view(torch.float32) * 0.125
    bits = (largest / torch.full_like(largest, top)).view(torch.int32)
    return ((bits + 0x7FFFF + ((bits >> 20) & 1)) & _SIGNIFICAND_4).view(torch.float32)


def unit_of(largest: float) -> float:
    """Returns the smallest power of two such that a largest scale of doubled numbers is at most 224 times it.

    It is the float32 of a tensor in NVFP4, whose scales are e4m3: half of 448 times it, in terms of ours.
    """
    if not 0 < largest < math.inf:
        return 1.0
    return 2.0 ** math.ceil(math.log2(largest * 2 / _LARGEST_E4M3))


def storable_scale(scale: torch.Tensor, number_format: str, unit: float) -> torch.Tensor:
    """Returns scales of doubled numbers, float32, as a tensor in the format holds them, never 0.

    Args:
        scale: what they should be, float32; for mxfp4 powers of two, as from `input_scale`.
        number_format: nvfp4 or mxfp4.
        unit: that of the tensor, for nvfp4.
    """
    if number_format == "mxfp4":
        return scale.clamp(2.0**-126, 2.0**126)
    coarse = (scale * (2 / unit)).clamp_(_SMALLEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn)
    return coarse.float() * (unit / 2)


def e2m1_codes(integers: torch.Tensor) -> torch.Tensor:
    """Returns the codes of doubled numbers, any shape, int8, as uint8 from 0 to 15.

    Raises:
        ValueError: if an integer is no doubled number.
    """
    magnitude, known = integers.to(torch.int16).abs(), _magnitudes(integers.device)
    code = torch.bucketize(magnitude, known).clamp_(max=len(MAGNITUDES) - 1)
    if not torch.equal(known[code], magnitude):
        raise ValueError("a weight has integers that are no doubled 4-bit floating-point numbers")
    return code.to(torch.uint8) | (integers < 0).to(torch.uint8) << 3


def e2m1_numbers(codes: torch.Tensor) -> torch.Tensor:
    """Returns the doubled numbers of codes, int8."""
    known = _magnitudes(codes.device).to(torch.int8)
    return torch.cat([known, -known])[codes.long()]


def pack_e2m1(integers: torch.Tensor) -> torch.Tensor:
    """Packs doubled numbers, `[rows, columns]`, int8, as compressed-tensors does: `[rows, columns / 2]`, uint8.

    The low four bits of byte j are the code of coordinate 2 j.

    Raises:
        ValueError: if `columns` is odd or an integer is no doubled number.
    """
    if integers.shape[1] % 2:
        raise ValueError(f"numbers of 4 bits come in pairs, not in rows of {integers.shape[1]}")
    codes = e2m1_codes(integers)
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Returns the doubled numbers of `pack_e2m1`, `[rows, columns]`, int8."""
    return e2m1_numbers(torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1))


def _magnitudes(device: torch.device) -> torch.Tensor:
    return torch.tensor(MAGNITUDES, dtype=torch.int16, device=device)


def stored_scale(scale: torch.Tensor, number_format: str) -> dict[str, torch.Tensor]:
    """Returns scales of doubled numbers as compressed-tensors stores them, by the names of its tensors.

    Args:
        scale: `[out, groups]`, as from `storable_scale`.
        number_format: nvfp4 or mxfp4.

    Returns:
        `weight_scale`, `[out, groups]`, and for nvfp4 `weight_global_scale`, `[1]`, float32, by which they are divided.
        Scales are float8_e4m3fn, for mxfp4 the exponents of e8m0, uint8.
    """
    step = scale.float() * 2
    if number_format == "mxfp4":
        exponents = torch.frexp(step).exponent - 1 + _BIAS_E8M0
        return {"weight_scale": exponents.clamp_(0, 254).to(torch.uint8)}
    unit = unit_of(float(scale.max())) if scale.numel() else 1.0
    return {
        "weight_scale": (step / unit).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.full((1,), 1 / unit, dtype=torch.float32, device=scale.device),
    }


def scale_of_stored(stored: torch.Tensor, global_scale: torch.Tensor | None) -> torch.Tensor:
    """Returns the scales of doubled numbers of `stored_scale`, bfloat16, which holds them exactly.

    Another writer's global scale may be no power of two: then they are float32.

    Args:
        stored: `weight_scale`, `[out, groups]`: e4m3 in any floating-point dtype, or exponents of e8m0, uint8.
        global_scale: `weight_global_scale`, `[1]`, or one for each row, `[out, 1]`; None for exponents.
    """
    if global_scale is None:
        return torch.exp2(stored.float() - (_BIAS_E8M0 + 1)).to(torch.bfloat16)
    scale = stored.float() / (2 * global_scale.float())
    exact = scale.to(torch.bfloat16)
    return exact if torch.equal(exact.float(), scale) else scale


__all__ = [
    "GROUP_SIZES",
    "INTEGER_BITS",
    "LARGEST",
    "MAGNITUDES",
    "NumberFormat",
    "e2m1_codes",
    "e2m1_numbers",
    "input_scale",
    "pack_e2m1",
    "round_e2m1",
    "scale_of_stored",
    "storable_scale",
    "stored_scale",
    "unit_of",
    "unpack_e2m1",
]
