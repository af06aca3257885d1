"""The container of a split linear and its input split."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import InputQuantization, InputSplit, fake_quantize, quantize_input, split_input
from quad_kernels.hadamard import hadamard_matrix
from torch import nn

from quad_modifiers.nn.quad_linear import QuadLinear

SPLITS = {
    "trivial": InputSplit(24),
    "U-type": InputSplit(24, 4),
    "hadamard": InputSplit(24, hadamard=True),
    "per head": InputSplit(24, 2, 8, keep_width=True, hadamard=True),
    "channels": InputSplit(24, 5, keep_width=True),
}


def container(split: InputSplit, bias: bool = True) -> tuple[QuadLinear, nn.Linear]:
    """A container that computes what `linear` does, and the linear."""
    torch.manual_seed(0)
    linear = nn.Linear(split.width, 10, bias=bias)
    copy = nn.Linear(split.width, 10, bias=bias)
    copy.load_state_dict(linear.state_dict())
    module = QuadLinear(copy, "down_proj")
    module.take_bias()
    outlier, residual = split_input(linear.weight.detach(), split)
    module.set_weights(split, residual, outlier, module.bias)
    return module, linear


def inputs(split: InputSplit) -> torch.Tensor:
    x = torch.randn(2, 7, split.width, generator=torch.Generator().manual_seed(1))
    x[..., split.outlier_index()] *= 50
    return x


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_split_weights_compute_the_same(split: InputSplit) -> None:
    module, linear = container(split)
    x = inputs(split)
    torch.testing.assert_close(module(x), linear(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_split_by_hand(split: InputSplit) -> None:
    x = inputs(split)
    outlier, residual = split_input(x, split)
    index = split.outlier_index()
    assert split.rank == len(index)
    if outlier is None:
        assert split.rank == 0
    else:
        assert torch.equal(outlier, x[..., index])
    rest = torch.ones(split.width, dtype=torch.bool)
    rest[index] = False
    wanted = x * rest if split.keep_width else x[..., rest]
    if split.hadamard:
        wanted = wanted @ hadamard_matrix(wanted.shape[-1]).float()
    torch.testing.assert_close(residual, wanted, rtol=1e-5, atol=1e-4)
    assert residual.shape[-1] == split.residual_width


def test_outliers_of_every_head() -> None:
    assert InputSplit(12, 2, 4, keep_width=True).outlier_index().tolist() == [0, 1, 4, 5, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 24, "block": 7}, r"block \(7\) must divide the input width \(24\)"),
        ({"width": 24, "outliers": 24}, r"outliers per block \(24\) must be smaller than the block \(24\)"),
        ({"width": 24, "outliers": -1}, "outliers per block"),
    ],
)
def test_impossible_splits(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputSplit(**arguments)


@torch.no_grad()
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_outlier_coordinates_bypass_the_quantization(split: InputSplit) -> None:
    module, linear = container(split, bias=False)
    module.input_quantization = InputQuantization(2, 0.92)
    x = inputs(split)
    torch.testing.assert_close(module(x), linear(x), rtol=1e-4, atol=1e-4)  # set but not switched on
    module.quantize_input = True
    only_outliers = torch.zeros_like(x)
    only_outliers[..., split.outlier_index()] = x[..., split.outlier_index()]
    only_rest = x - only_outliers
    if split.rank:
        torch.testing.assert_close(module(only_outliers), linear(only_outliers), rtol=1e-4, atol=1e-4)
    rest = module(only_rest)
    assert float((rest - linear(only_rest)).norm() / rest.norm()) > 0.05, "the residual is quantized"
    # The size of the outliers does not reach the residual's scale.
    torch.testing.assert_close(module(x), rest + module(only_outliers), rtol=1e-4, atol=1e-3)


def test_fake_quantization_is_that_of_the_kernel() -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    for group_size in (None, 8):
        settings = InputQuantization(4, 0.92, group_size)
        integers, scale = quantize_input(x, settings)
        wanted = integers.float() * scale.repeat_interleave(32 // scale.shape[-1], -1)
        assert torch.equal(fake_quantize(x, settings), wanted)
        assert fake_quantize(x.bfloat16(), settings).dtype == torch.bfloat16


def test_pass_through_keeps_the_wrapped_linear() -> None:
    """Modifiers that hold a reference to the linear may still change it, bias included."""
    linear = nn.Linear(6, 4)
    module = QuadLinear(linear, "q_proj")
    assert module.residual is linear
    with torch.no_grad():
        linear.weight *= 2
        linear.bias *= 3
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        torch.testing.assert_close(module(x), nn.functional.linear(x, weight, bias))
        module.take_bias()
        assert linear.bias is None
        assert torch.equal(module.bias, bias)
