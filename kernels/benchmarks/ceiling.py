"""What the machine can do at most, measured, and the time that a case needs at that rate."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from quad_kernels import QuantizedWeight, choose_backend, integer_linear
from torch.nn import functional as F

from benchmarks.shapes import QUANTIZATION, WEIGHT_BITS, Case, Linear

_REPEATS = 7


@dataclass(frozen=True)
class Ceiling:
    """Measured rates.

    Attributes:
        copy_bytes: bytes per second of a large copy, read and written bytes counted.
        read_bytes: bytes per second of a large sum.
        int8_operations: operations (a multiplication and an addition count two) per second of the largest int8 product:
            the best of `torch._int_mm` with either operand as the weight and the chosen backend's own product.
        float_operations: likewise of `F.linear` in the model's dtype.
    """

    copy_bytes: float
    read_bytes: float
    int8_operations: float
    float_operations: float

    def __str__(self) -> str:
        return (
            f"copy {self.copy_bytes / 1e9:.1f} GB/s, read {self.read_bytes / 1e9:.1f} GB/s, "
            f"int8 {self.int8_operations / 1e12:.2f} TOP/s, float {self.float_operations / 1e12:.2f} TFLOP/s"
        )

    def record(self) -> dict[str, float]:
        """For the row."""
        return asdict(self)


def measure_ceiling(device: torch.device, dtype: torch.dtype, size: int, bandwidth_bytes: int) -> Ceiling:
    """Measures the rates.

    Args:
        device: device to measure.
        dtype: dtype of the floating-point product.
        size: rows and columns of the square products.
        bandwidth_bytes: bytes of the buffers that are copied and read; a multiple of the last-level cache.
    """
    source = torch.ones(bandwidth_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy = _seconds(partial(target.copy_, source), device)
    read = _seconds(source.sum, device)
    del source, target
    x = torch.randint(-127, 128, (size, size), device=device, dtype=torch.int8)
    weight = torch.randint(-8, 8, (size, size), device=device, dtype=torch.int8)
    prepared = choose_backend(device).prepare_weight(
        QuantizedWeight(weight, torch.ones(size, 1, device=device), None, size, size, WEIGHT_BITS), QUANTIZATION
    )
    scale = torch.ones(size, 1, device=device)
    products: list[Callable[[], Any]] = [
        lambda: torch._int_mm(x, weight.T),
        lambda: torch._int_mm(weight, x.T.contiguous()),
        lambda: integer_linear(x, scale, prepared, out_dtype=dtype),
    ]
    operations = 2 * size**3
    int8 = min(seconds for product in products if (seconds := _seconds_or_none(product, device)) is not None)
    wide = torch.randn(size, size, device=device).to(dtype)
    wide_weight = torch.randn(size, size, device=device).to(dtype)
    floating = _seconds(lambda: F.linear(wide, wide_weight), device)
    bandwidth = bandwidth_bytes // 4 * 4
    return Ceiling(2 * bandwidth / copy, bandwidth / read, operations / int8, operations / floating)


def _seconds_or_none(call: Callable[[], Any], device: torch.device) -> float | None:
    """`_seconds`, or None where the device has no such product."""
    try:
        return _seconds(call, device)
    except RuntimeError:
        return None


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a call that takes long enough to be timed alone."""
    times = []
    for _ in range(_REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def least_seconds(case: Case, tokens: int, dtype: torch.dtype, ceiling: Ceiling) -> float:
    """Time of the QUAD linears of a case at the measured rates: the longer of traffic and arithmetic.

    Traffic: the input once, the weights at their 4 bits with scales, outlier weights and bias, the output once; not the
    quantized input, which an ideal kernel would keep on the chip. What runs between linears is not counted.
    """
    bandwidth = max(ceiling.copy_bytes, ceiling.read_bytes)
    return sum(
        max(
            _linear_bytes(linear, tokens, dtype) / bandwidth,
            2 * tokens * linear.quad_outputs * linear.split.residual_width / ceiling.int8_operations
            + 2 * tokens * linear.quad_outputs * linear.split.rank / ceiling.float_operations,
        )
        for linear in case.linears
    )


def _linear_bytes(linear: Linear, tokens: int, dtype: torch.dtype) -> float:
    outputs, split = linear.quad_outputs, linear.split
    values = tokens * (split.width + outputs) + outputs * (split.rank + 1 + linear.bias)
    return values * dtype.itemsize + outputs * split.residual_width * WEIGHT_BITS / 8
