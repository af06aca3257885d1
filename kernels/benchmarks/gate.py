"""Correctness of a QUAD layer on the very input that is timed: what is wrong is reported and not timed."""

import torch
from quad_kernels import QuantizedActivations, integer_linear, quantize_activations

from benchmarks.methods import QuadLayer
from benchmarks.shapes import QUANTIZATION

_MOST_FLIPS = 2e-3  # share of integers that a Hadamard in another order of summation may round the other way


def check(layer: QuadLayer, x: torch.Tensor, exact: bool) -> str | None:
    """Returns what differs from the references, or None.

    Args:
        layer: its first copy is checked.
        x: `[tokens, width]`.
        exact: also compare the integer sums bit by bit, which on a GPU compiles one more kernel.
    """
    own = quantize_activations(x, QUANTIZATION, layer.split)
    reference = quantize_activations(x, QUANTIZATION, layer.split, backend="reference")
    return _check_quantization(own, reference, layer.split.hadamard, x.dtype) or _check_linear(layer, own, x, exact)


def _check_quantization(
    own: QuantizedActivations, reference: QuantizedActivations, hadamard: bool, dtype: torch.dtype
) -> str | None:
    if own.outlier is not None and not torch.equal(own.outlier, reference.outlier):
        return "the outlier coordinates differ from the input"
    # The Hadamard is rounded to the model's dtype: the largest value of a token may land on a neighbour.
    tolerance = torch.finfo(dtype).eps if hadamard else 1e-6
    scale_error = float(((own.scale - reference.scale).abs() / reference.scale.abs().clamp_min(1e-30)).max())
    if not scale_error <= tolerance:
        return f"activation scales differ by {scale_error:.1e}, allowed is {tolerance:.1e}"
    difference = (own.integers.int() - reference.integers.int()).abs()
    largest = int(difference.max())
    # Another scale rounds a whole token differently; by one is right then, and how many is no measure.
    same_scale = (own.scale == reference.scale).all(1)
    flips = float((difference[same_scale] > 0).float().mean()) if bool(same_scale.any()) else 0.0
    allowed = _MOST_FLIPS if hadamard else 0.0
    if largest > 1 or flips > allowed:
        return f"{flips:.1e} of the integers differ, by up to {largest}; allowed is {allowed:.1e}, by 1"
    return None


def _check_linear(layer: QuadLayer, own: QuantizedActivations, x: torch.Tensor, exact: bool) -> str | None:
    weight, outlier_weight = layer.weights[0], layer.outlier_weights[0]

    def linear(dtype: torch.dtype, complete: bool, backend: str | None) -> torch.Tensor:
        return integer_linear(
            own.integers,
            own.scale,
            weight,
            outlier=own.outlier if complete else None,
            outlier_weight=outlier_weight if complete else None,
            bias=layer.bias if complete else None,
            out_dtype=dtype,
            backend=backend,
        )

    truth = linear(torch.float32, True, "reference")
    error = (linear(x.dtype, True, None).float() - truth).abs()
    allowed = torch.finfo(x.dtype).eps * (truth.abs() + truth.square().mean().sqrt())
    if not bool((error <= allowed).all()):
        return (
            f"the result differs from the reference by up to {float((error / allowed).max()):.1f} times the tolerance"
        )
    if exact:
        sums, truth = linear(torch.float32, False, None), linear(torch.float32, False, "reference")
        if not bool(((sums - truth).abs() <= 4 * torch.finfo(torch.float32).eps * truth.abs()).all()):
            return "integer sums differ from the reference"
    return None
