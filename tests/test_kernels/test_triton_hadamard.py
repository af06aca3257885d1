"""Online Hadamard in Triton, alone and with the quantizer."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import InputQuantization, InputSplit, apply_hadamard, ops, quantize_activations
from quad_kernels.hadamard import plan_hadamard

pytest.importorskip("triton")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# Powers of two; 36 * 16; 12 * 128; 76 * 64; 140 * 64 (several tiles of rows); 59 blocks of 16; 47 blocks of 32.
SIZES = [16, 32, 64, 512, 576, 1536, 4864, 8960, 944, 1504]
LARGE = [11008, 14336, 28672]  # several steps; 4 slices; 8 slices
LARGEST = [4096, 8192, 18944]
FALLBACK = [12, 28, 100, 23 * 16 * 3]

# Beside the rounding of the result, for inputs of size one: the terms left out (README), or sums in another order.
BOUNDS = {torch.bfloat16: 2.0**-14, torch.float16: 2.0**-15, torch.float32: 2.0**-19}


def activations(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(tokens, width, generator=generator).to(dtype)


def check_transform(device: torch.device, x: torch.Tensor) -> None:
    plan = plan_hadamard(x.shape[-1])
    got = apply_hadamard(x.to(device), plan).cpu()
    exact = apply_hadamard(x.double(), plan, backend="reference")
    assert got.dtype == x.dtype
    assert got.shape == x.shape
    # Rounding to nearest is off by half a unit of the value itself, at most.
    unit = torch.finfo(x.dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=0.51 * unit, atol=BOUNDS[x.dtype])


def check_quantized(
    device: torch.device, x: torch.Tensor, quantization: InputQuantization, split: InputSplit, packed: bool = False
) -> None:
    """Integers of the fused kernel are those of the separate one, but for sums that lie beside a rounding boundary."""
    got = quantize_activations(x.to(device), quantization, split, packed=packed)
    wanted = quantize_activations(x, quantization, split, backend="reference")
    integers = got.integers.cpu()
    if packed:
        from quad_kernels.packing import unpack_nibbles

        integers = unpack_nibbles(integers, split.residual_width)
    assert (got.outlier is None) == (wanted.outlier is None)
    if got.outlier is not None and wanted.outlier is not None:
        assert torch.equal(got.outlier.cpu(), wanted.outlier)
    torch.testing.assert_close(got.scale.cpu(), wanted.scale, rtol=max(1e-6, 2 * torch.finfo(x.dtype).eps), atol=0)
    difference = (integers.int() - wanted.integers.int()).abs()
    assert int(difference.max()) <= 1
    assert int(difference.count_nonzero()) <= 1 + 0.01 * difference.numel()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_transform(device: torch.device, size: int, dtype: torch.dtype) -> None:
    check_transform(device, activations(3, size, dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", LARGE)
def test_transform_of_large_sizes(device: torch.device, size: int) -> None:
    check_transform(device, activations(1, size, torch.bfloat16))


@pytest.mark.parametrize("size", FALLBACK)
def test_sizes_without_a_power_of_two_run_the_reference(device: torch.device, size: int) -> None:
    from quad_kernels.hadamard.launch import supports

    x = activations(2, size, torch.float32)
    assert not supports(x, size)
    check_transform(device, x)


@pytest.mark.parametrize("size", SIZES + LARGE + LARGEST)
def test_tiles_cover_the_plan(size: int) -> None:
    from quad_kernels.hadamard.tiling import tiling

    tiles = tiling(plan_hadamard(size))
    assert tiles is not None
    assert tiles.left * tiles.slices * tiles.right == size
    assert tiles.tile * tiles.tiles >= tiles.left
    assert tiles.depth * tiles.steps >= tiles.left


def test_float64_runs_the_reference(device: torch.device) -> None:
    x = activations(2, 64, torch.float64).to(device)
    wanted = apply_hadamard(x, plan_hadamard(64), backend="reference")
    assert torch.equal(apply_hadamard(x, plan_hadamard(64)), wanted)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "split",
    [
        InputSplit(576, hadamard=True),
        InputSplit(576, 8, 64, keep_width=True, hadamard=True),
        InputSplit(1536, 64, 0, keep_width=True, hadamard=True),
        InputSplit(576 + 36, 4, 68, hadamard=True),
        InputSplit(528, 16, hadamard=True),
        InputSplit(8960, 64, 0, keep_width=True, hadamard=True),
        InputSplit(100, 4, 0, keep_width=True, hadamard=True),
    ],
    ids=["whole", "heads", "down_proj", "heads dropped", "one block dropped", "tiles", "reference"],
)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_with_the_quantizer(
    device: torch.device, symmetric: bool, tokens: int, split: InputSplit, dtype: torch.dtype
) -> None:
    quantization = InputQuantization(4, 0.9, symmetric=symmetric)
    check_quantized(device, activations(tokens, split.width, dtype), quantization, split)


@pytest.mark.parametrize(("group_size", "packed"), [(64, False), (None, True), (64, True), (128, True)])
def test_groups_and_packing_take_a_second_kernel(device: torch.device, group_size: int | None, packed: bool) -> None:
    split = InputSplit(1024, 8, 64, keep_width=True, hadamard=True)
    check_quantized(device, activations(3, 1024, torch.bfloat16), InputQuantization(4, 0.9, group_size), split, packed)


@pytest.mark.parametrize("tokens", [16, 63])
def test_programs_take_turns_with_the_tokens(device: torch.device, tokens: int) -> None:
    split = InputSplit(64, 4, 0, keep_width=True, hadamard=True)
    check_quantized(device, activations(tokens, 64, torch.bfloat16), InputQuantization(8, 1.0), split)


@pytest.mark.parametrize("size", [576, 1536, 4864])
@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 64, "right": 64},
        {"rows": 64, "loaded": 32, "joined": 32},
        {"programs": 1, "stages": 2, "joined": 64},
        {"right": 64, "loaded": 64, "programs": 2},
    ],
    ids=["64 rows", "slice by slice", "turns", "turns of slices of 64"],
)
def test_configurations(device: torch.device, size: int, changes: dict[str, int]) -> None:
    from quad_kernels.hadamard.launch import Configuration, hadamard_quantize

    split, quantization = InputSplit(size, 16, 0, True, True), InputQuantization(4, 0.9)
    x = activations(5, size, torch.bfloat16)
    outlier, integers, scale = hadamard_quantize(x.to(device), quantization, split, Configuration(**changes))
    wanted = quantize_activations(x, quantization, split, backend="reference")
    assert outlier is not None
    assert wanted.outlier is not None
    assert torch.equal(outlier.cpu(), wanted.outlier)
    torch.testing.assert_close(scale.cpu(), wanted.scale, rtol=2**-7, atol=0)
    difference = (integers.cpu().int() - wanted.integers.int()).abs()
    assert int(difference.max()) <= 1
    assert int(difference.count_nonzero()) <= 1 + 0.01 * difference.numel()


def test_zero_token_and_no_tokens(device: torch.device) -> None:
    split, quantization = InputSplit(576, 8, 64, True, True), InputQuantization(4, 0.9)
    x = activations(3, 576, torch.bfloat16)
    x[1] = 0
    got = quantize_activations(x.to(device), quantization, split)
    assert got.scale[1].item() == 0
    assert int(got.integers[1].abs().max()) == 0
    assert quantize_activations(x[:0].to(device), quantization, split).integers.shape == (0, 576)
    assert apply_hadamard(x[:0].to(device), plan_hadamard(576)).shape == (0, 576)


def test_a_huge_value_spreads_exactly(device: torch.device) -> None:
    """One value of 2^100 is 2^100 / sqrt(n) everywhere: nothing overflows in between."""
    x = torch.zeros(1, 1024)
    x[0, 700] = 2.0**100
    got = apply_hadamard(x.to(device), plan_hadamard(1024)).cpu()
    assert torch.equal(got.abs(), torch.full_like(x, 2.0**95))
    check_transform(device, (x / 2.0**90).half())


@pytest.mark.filterwarnings("ignore:.*value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_spoils_its_token_alone(device: torch.device, value: float) -> None:
    x = activations(3, 576, torch.bfloat16)
    x[1, 99] = value
    for quantization in (InputQuantization(4, 0.9), InputQuantization(4, 0.9, symmetric=False)):
        got = quantize_activations(x.to(device), quantization, InputSplit(576, hadamard=True))
        assert got.scale.isfinite().squeeze(1).tolist() == [True, False, True]
        assert int(got.integers[1].abs().max()) == 0
    assert apply_hadamard(x.to(device), plan_hadamard(576)).isnan().all(1).tolist() == [False, True, False]


def test_inputs_that_are_not_contiguous(device: torch.device) -> None:
    x = activations(5, 96, torch.bfloat16)
    split = InputSplit(64, 4, 0, True, True)
    for view in (x[:, 16:80], x[::2, :64], x[:, :64].T.contiguous().T):
        strided = view.to(device).as_strided(view.shape, view.stride()) if device.type == "cpu" else view.to(device)
        check_quantized(device, view, InputQuantization(4, 0.9), split)
        wanted = apply_hadamard(view.contiguous(), plan_hadamard(64), backend="reference")
        got = apply_hadamard(strided, plan_hadamard(64)).cpu()
        torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-12)


def test_operator_contract(device: torch.device) -> None:
    x = activations(3, 64, torch.bfloat16).to(device)
    checked = torch.library.opcheck(ops.hadamard, (x, "triton"))
    assert set(checked.values()) == {"SUCCESS"}
    arguments = (x, 4, 0.9, 0, 0, True, 4, 0, True, True, None, -1.0, False, "triton")
    assert set(torch.library.opcheck(ops.quantize_activations, arguments).values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", LARGE + LARGEST)
def test_large(device: torch.device, size: int, dtype: torch.dtype) -> None:
    x = activations(300, size, dtype)
    check_transform(device, x)
    check_quantized(device, x, InputQuantization(4, 0.9), InputSplit(size, 64, 0, True, True))
