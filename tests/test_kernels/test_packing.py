"""Packing of integers into int32 words."""

from __future__ import annotations

import pytest
import torch
from quad_kernels.packing import PACKABLE_BITS, pack_int32, unpack_int32


def random_integers(rows: int, columns: int, bits: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randint(-half, half, (rows, columns), dtype=torch.int8, generator=generator)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 8), (5, 7), (4, 63), (2, 129)])
def test_round_trip_and_compressed_tensors_layout(bits: int, rows: int, columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    integers = random_integers(rows, columns, bits)
    packed = pack_int32(integers, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(packed, pack_to_int32(integers, bits))
    unpacked = unpack_int32(packed, bits, columns)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, integers)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_extremes_of_the_range(bits: int) -> None:
    half = 2 ** (bits - 1)
    integers = torch.tensor([[-half, half - 1] * 9], dtype=torch.int8)
    assert torch.equal(unpack_int32(pack_int32(integers, bits), bits, 18), integers)


def test_first_integer_is_in_the_lowest_bits() -> None:
    assert pack_int32(torch.tensor([[-7, -8, -8, -8, -8, -8, -8, -8]], dtype=torch.int8), 4).tolist() == [[1]]
    assert pack_int32(torch.tensor([[-8, -8, -8, -8, -8, -8, -8, 7]], dtype=torch.int8), 4).tolist() == [[-(2**28)]]


@pytest.mark.parametrize("value", [8, -9])
def test_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=rf"integers from .*{value}.* do not fit in 4 bits"):
        pack_int32(torch.tensor([[0, value]], dtype=torch.int8), 4)


@pytest.mark.parametrize("bits", [0, 3, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits \({bits}\) must be one of"):
        pack_int32(torch.zeros(1, 8, dtype=torch.int8), bits)
    with pytest.raises(ValueError, match=rf"bits \({bits}\) must be one of"):
        unpack_int32(torch.zeros(1, 1, dtype=torch.int32), bits, 8)


@pytest.mark.parametrize("columns", [8, 17])
def test_wrong_number_of_words_is_refused(columns: int) -> None:
    with pytest.raises(ValueError, match=f"2 words of 8 integers do not make a row of {columns}"):
        unpack_int32(torch.zeros(1, 2, dtype=torch.int32), 4, columns)
