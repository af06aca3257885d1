"""Weights in every layout, and a layout and a backend that another distribution brings."""

from collections.abc import Iterator

import pytest
import torch
from quad_kernels import (
    Backend,
    InputQuantization,
    InputSplit,
    LinearOperands,
    QuantizedWeight,
    WeightLayout,
    prepare_weight,
    quad_linear,
    register_backend,
)
from quad_kernels.backends import temporary_registrations
from quad_kernels.integer_linear.onednn import onednn_takes

OUT, WIDTH = 24, 80


def make_weight(bits: int = 4, groups: int = 1, zero_points: bool = False) -> QuantizedWeight:
    generator, half = torch.Generator().manual_seed(bits), 2 ** (bits - 1)
    integers = torch.randint(-half, half, (OUT, WIDTH), dtype=torch.int8, generator=generator)
    scale = torch.rand(OUT, groups, generator=generator) + 0.1
    zero = torch.randint(-half, half, (OUT, groups), dtype=torch.int8, generator=generator) if zero_points else None
    return QuantizedWeight(integers, scale, zero, WIDTH, OUT, bits)


@pytest.mark.parametrize("layout", ["int8", "nibbles", "onednn", "lines4", "lines8"])
@pytest.mark.parametrize(("bits", "groups", "zero_points"), [(4, 1, False), (2, 4, True), (8, 2, False)])
def test_every_layout_gives_the_integers_and_the_words_back(
    layout: str, bits: int, groups: int, zero_points: bool
) -> None:
    plain = make_weight(bits, groups, zero_points)
    stored = plain.to_layout(layout)
    accepted = {
        "int8": True,
        "nibbles": bits <= 4,
        "onednn": onednn_takes(plain),
        "lines4": bits <= 4 and (groups == 1 or WIDTH // groups % 8 == 0),
        "lines8": groups == 1 or WIDTH // groups % 4 == 0,
    }[layout]
    assert stored.layout == (layout if accepted else "int8")
    assert stored.to_layout(layout) is stored
    assert torch.equal(stored.unpacked(), plain.integers)
    assert torch.equal(stored.to_layout("int8").integers, plain.integers)
    assert torch.equal(stored.to_words(), plain.to_words())
    assert torch.equal(stored.dequantized(torch.float32), plain.dequantized(torch.float32))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_are_read_back_with_their_zero_points(bits: int) -> None:
    plain = make_weight(bits, 4, zero_points=True)
    read = QuantizedWeight.from_words(plain.to_words(), plain.scale, bits, WIDTH, plain.zero_point_words())
    assert torch.equal(read.integers, plain.integers)
    assert torch.equal(read.zero_point, plain.zero_point)
    assert (read.in_features, read.out_features, read.bits, read.layout) == (WIDTH, OUT, bits, "int8")
    assert make_weight(bits).zero_point_words() is None


def test_words_that_do_not_fit_are_refused() -> None:
    words = make_weight().to_words()
    with pytest.raises(ValueError, match="96 inputs of 4 bits are 12 words, weight_packed has 10"):
        QuantizedWeight.from_words(words, torch.ones(OUT, 1), 4, 96)
    with pytest.raises(ValueError, match=r"weight_scale \[24, 3\] does not fit a weight of 24 outputs and 80 inputs"):
        QuantizedWeight.from_words(words, torch.ones(OUT, 3), 4, WIDTH)


def test_rows_are_a_part_of_the_output_channels() -> None:
    plain = make_weight(groups=2, zero_points=True)
    part = plain.rows(slice(8, 20))
    assert part.out_features == 12
    assert torch.equal(part.dequantized(torch.float32), plain.dequantized(torch.float32)[8:20])
    assert part.integers.untyped_storage().data_ptr() == plain.integers.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match=r"rows need a weight in layout int8, not nibbles; call to_layout\('int8'\)"):
        plain.to_layout("nibbles").rows(slice(2))


def test_an_unknown_layout_lists_the_known_ones() -> None:
    known = "int8, lines4, lines8, lines_e2m1, nibbles, onednn"
    with pytest.raises(ValueError, match=f"no weight layout 'int3'; there are {known}"):
        make_weight().to_layout("int3")


# --- what another distribution writes: a layout, a backend that reads it, and one call ---


LAYOUTS = {
    "columns": WeightLayout(
        pack=lambda integers: (integers.T.to(torch.int16) + 128).to(torch.uint8).contiguous(),
        unpack=lambda stored, in_features: (stored.T.to(torch.int16) - 128).to(torch.int8).contiguous(),
        accepts=lambda weight: weight.zero_point is None,
    )
}


class Columns(Backend):
    """Keeps a weight by columns, as uint8 with an offset: a second uint8 layout, which its dtype does not tell."""

    name = "columns"
    layouts = LAYOUTS

    def __init__(self) -> None:
        self.seen: list[str] = []

    def prepare_weight(self, weight, quantization):
        return weight.to_layout("columns")

    def integer_linear(self, operands: LinearOperands) -> torch.Tensor:
        self.seen.append(operands.weight.layout)
        return super().integer_linear(operands)


@pytest.fixture
def columns() -> Iterator[Columns]:
    backend = Columns()
    with temporary_registrations():
        register_backend(backend)
        yield backend


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_layer_runs_in_a_layout_of_another_distribution(columns: Columns, compiled: bool) -> None:
    split, quantization = InputSplit(WIDTH + 16, 16), InputQuantization()
    plain, outlier_weight = make_weight(), torch.randn(OUT, 16, generator=torch.Generator().manual_seed(1))
    weight = prepare_weight(
        plain.to_words(), plain.scale, bits=4, in_features=WIDTH, quantization=quantization, backend="columns"
    )
    assert (weight.layout, weight.integers.dtype, weight.integers.shape) == ("columns", torch.uint8, (WIDTH, OUT))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return quad_linear(x, weight, split, quantization, outlier_weight=outlier_weight, backend="columns")

    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(2, 3, split.width, generator=torch.Generator().manual_seed(2))
    wanted = quad_linear(x, plain, split, quantization, outlier_weight=outlier_weight, backend="reference")
    assert torch.equal(run(x), wanted)
    assert columns.seen == ["columns"]
    assert torch.equal(weight.to_layout("int8").integers, plain.integers)
    assert torch.equal(weight.to_words(), plain.to_words())


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("x_groups", [None, 16])
def test_a_backend_converts_a_layout_that_it_does_not_know(
    columns: Columns, backend: str, x_groups: int | None
) -> None:
    plain, split = make_weight(), InputSplit(WIDTH)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3))
    stored, quantization = plain.to_layout("columns"), InputQuantization(4, group_size=x_groups)
    wanted = quad_linear(x, plain, split, quantization, backend=backend)
    assert torch.equal(quad_linear(x, stored, split, quantization, backend=backend), wanted)
    assert stored.to_layout("nibbles").layout == "nibbles"


def test_a_weight_that_a_layout_does_not_accept_stays_int8(columns: Columns) -> None:
    assert make_weight(zero_points=True).to_layout("columns").layout == "int8"


def test_a_layout_has_one_name(columns: Columns) -> None:
    other = {"nibbles": LAYOUTS["columns"]}

    class Other(Backend):
        name = "other"
        layouts = other

    with pytest.raises(ValueError, match="a weight layout named 'nibbles' exists already; choose another name"):
        register_backend(Other())


def test_the_layout_goes_with_its_backend() -> None:
    with temporary_registrations():
        register_backend(Columns())
        assert make_weight().to_layout("columns").layout == "columns"
    with pytest.raises(ValueError, match=r"no weight layout 'columns'.* register that first"):
        make_weight().to_layout("columns")
