"""Triton functions that several kernels share: places of the coordinates of a split input, and rounding to a grid."""

import triton
import triton.language as tl


@triton.jit
def residual_source(
    column: tl.tensor,
    WIDTH: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP_WIDTH: tl.constexpr,
) -> tl.tensor:
    """Input coordinate of a residual coordinate."""
    if KEEP_WIDTH or OUTLIERS == 0:
        return column
    if BLOCK == WIDTH:
        return column + OUTLIERS
    KEPT: tl.constexpr = BLOCK - OUTLIERS
    return column // KEPT * BLOCK + OUTLIERS + column % KEPT


@triton.jit
def outlier_source(index: tl.tensor, WIDTH: tl.constexpr, OUTLIERS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Input coordinate of an outlier coordinate."""
    if BLOCK == WIDTH:
        return index
    return index // OUTLIERS * BLOCK + index % OUTLIERS


@triton.jit
def drop_outliers(
    x: tl.tensor, column: tl.tensor, OUTLIERS: tl.constexpr, BLOCK: tl.constexpr, KEEP_WIDTH: tl.constexpr
) -> tl.tensor:
    """Zeros in the place of outliers, where the residual keeps the full width."""
    if KEEP_WIDTH and OUTLIERS > 0:
        return tl.where(column % BLOCK >= OUTLIERS, x, 0.0)
    return x


@triton.jit
def magnitude_bits(x: tl.tensor) -> tl.tensor:
    """The bits of |x| as float32: they are ordered as the values are, with NaN above infinity."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def below_zero(x: tl.tensor) -> tl.tensor:
    """The numbers below 0 as float32, 0 for the others and NaN."""
    wide = x.to(tl.float32)
    return tl.where(wide < 0.0, wide, 0.0)


@triton.jit
def above_zero(x: tl.tensor) -> tl.tensor:
    """The numbers above 0 as float32, 0 for the others and NaN."""
    wide = x.to(tl.float32)
    return tl.where(wide > 0.0, wide, 0.0)


@triton.jit
def symmetric_grid(largest: tl.tensor, clip_ratio: tl.tensor, BITS: tl.constexpr) -> tuple[tl.tensor, float, float]:
    """Scale, smallest and largest integer of tokens, from their largest `magnitude_bits`.

    The scale is 0 if it is not a normal number; NaN and inf stay.
    """
    HALF_RANGE: tl.constexpr = (2**BITS - 1) / 2
    scale = _normal(tl.div_rn(largest.to(tl.float32, bitcast=True) * clip_ratio, HALF_RANGE))
    return scale, -(2.0 ** (BITS - 1)), 2.0 ** (BITS - 1) - 1.0


@triton.jit
def e2m1_grid(
    largest: tl.tensor, clip_ratio: tl.tensor, TOP: tl.constexpr, POWERS: tl.constexpr
) -> tuple[tl.tensor, float, float]:
    """The same for doubled 4-bit floating-point numbers: `quad_kernels.float4.input_scale`, POWERS for MXFP4."""
    wanted = largest.to(tl.float32, bitcast=True) * clip_ratio
    if POWERS:
        bits = (wanted.to(tl.int32, bitcast=True) + (1 << 21)) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True) * 0.125
    else:
        bits = tl.div_rn(wanted, TOP).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -1048576
        scale = bits.to(tl.float32, bitcast=True)
    return _normal(scale), -12.0, 12.0


@triton.jit
def asymmetric_grid(
    least: tl.tensor, most: tl.tensor, largest: tl.tensor, clip_ratio: tl.tensor, BITS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The same with zero points, which the ends have taken off; from the smallest number up to 0, the largest from 0
    on, and the largest `magnitude_bits`, which know of NaN.
    """
    LEVELS: tl.constexpr = 2.0**BITS - 1.0
    magnitude = largest.to(tl.float32, bitcast=True)
    finite = magnitude < float("inf")
    least = tl.where(finite, least, 0.0) * clip_ratio
    most = tl.where(finite, most, 0.0) * clip_ratio
    scale = tl.where(finite, _normal(tl.div_rn(most, LEVELS) - tl.div_rn(least, LEVELS)), magnitude)
    zero_point = (round_to_grid(-least, scale, 0.0, LEVELS) & 0xFF).to(tl.float32)
    return scale, 0.0 - zero_point, LEVELS - zero_point


@triton.jit
def _normal(scale: tl.tensor) -> tl.tensor:
    return tl.where(scale < 1.1754943508222875e-38, 0.0, scale)


@triton.jit
def common_scale(widest: tl.tensor, steps: tl.tensor, MOST: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """One scale for all steps, of which `widest` is the largest, and the integer factors, 1 to MOST, that bring it
    close to each; 0 for a scale of 0, inf or NaN.
    """
    scale = _normal(tl.div_rn(widest, MOST * 1.0))
    return scale, round_to_grid(steps, scale + steps * 0.0, 1.0, MOST * 1.0) & 0xFF


@triton.jit
def e2m1_cost(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """`rounding_cost` of quantize_activations/reference.py, of rows with one scale each."""
    quotient = _quotient(x, scale)
    number = _nearest_e2m1(tl.minimum(tl.maximum(quotient, -12.0), 12.0))
    error = tl.minimum(tl.maximum(quotient - number, -4.0), 4.0) * 32.0
    error = (error + 12582912.0) - 12582912.0
    return tl.sum(error * error, 1, keep_dims=True) * scale * scale


@triton.jit
def _nearest_e2m1(quotient: tl.tensor) -> tl.tensor:
    magnitude = tl.abs(quotient)
    unit = tl.where(magnitude >= 8.0, 4.0, tl.where(magnitude >= 4.0, 2.0, 1.0))
    part = tl.where(magnitude >= 8.0, 0.25, tl.where(magnitude >= 4.0, 0.5, 1.0))
    return ((quotient * part + 12582912.0) - 12582912.0) * unit


@triton.jit
def _quotient(x: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """That of an IEEE division: Markstein's correction, twice; x for a scale of 0, inf or NaN."""
    usable = (scale > 0.0) & (scale < float("inf"))
    # A power of two that keeps the remainders below out of the subnormal numbers.
    shift = tl.where(scale < 8.673617379884035e-19, 1.8446744073709552e19, 1.0)
    shift = tl.where(scale > 1.152921504606847e18, 5.421010862427522e-20, shift)
    divisor = tl.where(usable, scale * shift, 1.0)
    inverse = tl.div_rn(1.0, divisor)
    x = x.to(tl.float32) * shift
    quotient = x * inverse
    quotient = tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)
    return tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)


@triton.jit
def round_to_grid(
    x: tl.tensor, scale: tl.tensor, smallest: tl.tensor, largest: tl.tensor, E2M1: tl.constexpr = False
) -> tl.tensor:
    """Integers of the rounded quotient x / scale in the low bits of an int32, 0 for a scale of 0, inf or NaN.

    With E2M1 they are doubled 4-bit floating-point numbers, which lie 2 apart from 4 on and 4 apart from 8 on.

    `scale` and the ends of the grid have one value per row, or the ends are constants.
    """
    usable = (scale > 0.0) & (scale < float("inf"))
    quotient = tl.minimum(tl.maximum(_quotient(x, scale), smallest), largest)
    if E2M1:
        quotient = _nearest_e2m1(quotient)
    # Adding 1.5 * 2^23 rounds to nearest even and leaves the integer in the low bits of the sum.
    integer = (quotient + 12582912.0).to(tl.int32, bitcast=True)
    return integer & tl.where(usable, -1, 0)
