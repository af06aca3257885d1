"""Weights for the tests of the native CPU kernels, whether there are such kernels, and all the ways to run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from quad_kernels import NumberFormat, QuantizedWeight, float4, quad_linear
from quad_kernels.native import library, lines

MISSING: str | None = None
try:
    library.load()
except library.NativeLibraryError as error:
    MISSING = str(error)


def random_weight(
    out: int, width: int, bits: int, groups: int = 1, zero_points: bool = False, seed: int = 0, unit: bool = False
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    integers = torch.randint(-half, half, (out, width), generator=generator, dtype=torch.int8)
    scale = torch.ones(out, groups) if unit else torch.rand(out, groups, generator=generator) + 0.5
    zero_point = torch.randint(-half, half, (out, groups), generator=generator, dtype=torch.int8)
    return QuantizedWeight(integers, scale, zero_point if zero_points else None, width, out, bits)


def random_sub_scaled(out: int, width: int, group_size: int, bits: int = 4, unit: bool = False) -> QuantizedWeight:
    """A weight of two levels; the sub-scales of its first channel are all 15."""
    weight = random_weight(out, width, bits, seed=group_size, unit=unit)
    generator = torch.Generator().manual_seed(width)
    sub_scale = torch.randint(1, 16, (width // group_size, out), generator=generator, dtype=torch.int8)
    sub_scale[:, 0] = 15
    return replace(weight, sub_scale=sub_scale)


def random_float4(out: int, width: int, number_format: NumberFormat, unit: bool = False) -> QuantizedWeight:
    """A weight of 4-bit floating-point numbers; with `unit` one scale for all of them, which is 1."""
    generator = torch.Generator().manual_seed(width)
    magnitudes = torch.tensor(float4.MAGNITUDES, dtype=torch.int8)
    drawn = magnitudes[torch.randint(0, 8, (out, width), generator=generator)]
    integers = drawn * (1 - 2 * torch.randint(0, 2, (out, width), generator=generator, dtype=torch.int8))
    groups = 1 if unit else width // float4.GROUP_SIZES[number_format]
    scale = torch.exp2(torch.randint(-2, 2, (out, groups), generator=generator).float())
    scale = torch.ones(out, 1) if unit else scale
    return QuantizedWeight(integers, scale, None, width, out, float4.INTEGER_BITS, number_format=number_format)


def in_lines(weight: QuantizedWeight) -> QuantizedWeight:
    stored = weight.to_layout(lines.best_layout(weight))
    assert stored.layout.startswith("lines")
    return stored


def exact(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """The sums of the integers, int64."""
    wide = weight.unpacked().long()
    if weight.zero_point is not None:
        wide = wide - weight.zero_point.long().repeat_interleave(weight.in_features // weight.scale.shape[1], 1)
    return x.long() @ wide.T


def everywhere(threads: Sequence[int]) -> Iterator[None]:
    """Yields with each instruction set of the processor and each number of threads."""
    before, count = library.instruction_set(), torch.get_num_threads()
    try:
        for name in library.supported():
            library.choose_instruction_set(name)
            for number in threads:
                torch.set_num_threads(number)
                yield
    finally:
        torch.set_num_threads(count)
        library.choose_instruction_set(before)


def results_everywhere(given: dict[str, Any], threads: Sequence[int], tokens: Sequence[int]) -> Iterator[torch.Tensor]:
    """A layer of all its input by every instruction set and number of threads; put together of batches too."""
    for _ in everywhere(threads):
        for size in (len(given["x"]), *tokens):
            parts = given["x"].split(size)
            yield torch.cat([quad_linear(**(given | {"x": part}), backend="native") for part in parts])
