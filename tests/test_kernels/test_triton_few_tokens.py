"""The Triton kernel of the integer linear layer for few tokens; without a GPU in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quad_kernels import LinearOperands, QuantizedWeight, integer_linear
from quad_kernels.packing import pack_nibbles

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("own_cache", "poisoned")

from quad_kernels.integer_linear.few_tokens import CANDIDATES, FewTokensConfig, default_config, fits  # noqa: E402

SMALL = FewTokensConfig(4, 128, 1, 2)


def integers(shape: tuple[int, ...], bits: int, seed: int) -> torch.Tensor:
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 0.001).to(dtype)


def layer(
    m: int, n: int, k: int, rank: int = 0, bias: bool = False, bits: int = 8, dtype: torch.dtype = torch.float32
) -> LinearOperands:
    """Operands of a layer; the output has the dtype of everything that is no integer."""
    scale = scales(n, 1, seed=2, dtype=dtype)
    return LinearOperands(
        x=integers((m, k), bits, 0),
        x_scale=scales(m, 1, seed=4),
        weight=QuantizedWeight(integers((n, k), 4, 1), scale, None, k, n, 4).to_layout("nibbles"),
        outlier=normal(m, rank, seed=5, dtype=dtype) if rank else None,
        outlier_weight=normal(n, rank, seed=6, dtype=dtype) if rank else None,
        bias=normal(n, seed=7, dtype=dtype) if bias else None,
        out_dtype=dtype,
    )


def moved(operands: LinearOperands, device: torch.device) -> LinearOperands:
    weight = operands.weight
    weight = replace(weight, integers=weight.integers.to(device), scale=weight.scale.to(device))
    tensors = {
        name: None if tensor is None else tensor.to(device)
        for name in ("x", "x_scale", "outlier", "outlier_weight", "bias")
        for tensor in [getattr(operands, name)]
    }
    return replace(operands, weight=weight, **tensors)


def reference(operands: LinearOperands) -> torch.Tensor:
    from quad_kernels.integer_linear import reference

    return reference.integer_linear(operands)


def run(operands: LinearOperands, device: torch.device, config: FewTokensConfig | None = None) -> torch.Tensor:
    """The kernel for few tokens, or the choice without `config`, on `device`."""
    from quad_kernels.integer_linear import launch

    ready = launch.Launch(moved(operands, device))
    assert ready.takes_few_tokens
    return launch.integer_linear(moved(operands, device), config).cpu()


def with_unit_scales(operands: LinearOperands) -> LinearOperands:
    weight = replace(operands.weight, scale=torch.ones_like(operands.weight.scale))
    return replace(operands, x_scale=torch.ones_like(operands.x_scale), weight=weight)


def assert_rounded_alike(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Both sum in float32, in another order, and round once: they differ by at most one step of the output."""
    bound = float(2e-6 * wanted.float().abs().max())
    torch.testing.assert_close(got, wanted, rtol=torch.finfo(wanted.dtype).eps, atol=bound)


@pytest.mark.parametrize("config", [None, SMALL], ids=["chosen", "small"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 70, 576), (3, 5, 4096), (8, 9, 132), (5, 3, 1408), (2, 3, 4)])
def test_integer_sums_are_exact(m: int, n: int, k: int, config: FewTokensConfig | None, device: torch.device) -> None:
    operands = with_unit_scales(layer(m, n, k))
    wanted = (operands.x.double() @ operands.weight.unpacked().double().T).float()
    assert torch.equal(run(operands, device, config), wanted)


@pytest.mark.parametrize("config", CANDIDATES, ids=lambda config: "x".join(map(str, config[:4])))
def test_every_candidate_gives_the_integers_of_the_other_kernel(config: FewTokensConfig, device: torch.device) -> None:
    """One step, several steps, and a last one beyond the end; the scales are multiplied in the same order."""
    from quad_kernels.integer_linear import launch
    from quad_kernels.integer_linear.config import Config

    group = 8 * config.block_w * config.depth
    for k in (group - 128, group, group + 384):
        operands = layer(1, 2, k, bits=4, dtype=torch.bfloat16)
        wanted = launch.integer_linear(moved(operands, device), Config(16, 64, 512, 1, 4, 3)).cpu()
        assert torch.equal(run(operands, device, config), wanted)


@pytest.mark.parametrize(("x_value", "w_value"), [(-128, -8), (-128, 7)])
def test_largest_sums_do_not_overflow(x_value: int, w_value: int, device: torch.device) -> None:
    k = 2**17 - 4
    weight = QuantizedWeight(torch.full((1, k), w_value, dtype=torch.int8), torch.ones(1, 1), None, k, 1, 4)
    x = torch.full((1, k), x_value, dtype=torch.int8)
    operands = LinearOperands(x, torch.ones(1, 1), weight.to_layout("nibbles"), None, None, None, torch.float32)
    assert float(run(operands, device)) == k * x_value * w_value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("m", "rank", "bias"), [(1, 64, True), (3, 72, False), (8, 8, True), (2, 0, True), (1, 5, True)]
)
def test_complete_layer_agrees_with_the_reference(
    m: int, rank: int, bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    operands = layer(m, 9, 300, rank, bias, bits=4, dtype=dtype)
    got = run(operands, device)
    assert got.dtype == dtype
    assert_rounded_alike(got, reference(operands))
    assert_rounded_alike(run(operands, device, SMALL), reference(operands))


def test_zero_tokens_and_a_huge_value(device: torch.device) -> None:
    operands = with_unit_scales(layer(4, 9, 300, bits=4))
    operands.x[1] = 0
    operands = replace(operands, x_scale=torch.tensor([[1.0], [0.0], [1e30], [1e-30]]))
    sums = (operands.x.double() @ operands.weight.unpacked().double().T).float()
    assert torch.equal(run(operands, device), sums * operands.x_scale)


def test_strided_inputs(device: torch.device) -> None:
    """Columns of a wider tensor at a multiple of four, transposed outliers, one scale for all tokens."""
    m, n, k, rank = 3, 11, 200, 16
    plain = layer(m, n, k, rank, dtype=torch.bfloat16)
    plain = replace(plain, x_scale=torch.ones(m, 1))
    wide, outliers = torch.zeros(m, k + 40, dtype=torch.int8), torch.zeros(m, rank + 7, dtype=torch.bfloat16)
    wide[:, 36:-4], outliers[:, 7:] = plain.x, plain.outlier
    strided = replace(
        plain,
        x=wide.to(device)[:, 36:-4],
        x_scale=torch.ones(1, 1).expand(m, 1),
        outlier=outliers.to(device)[:, 7:],
        outlier_weight=plain.outlier_weight.T.contiguous().T,
    )
    assert torch.equal(run(strided, device), run(plain, device))


def test_what_it_does_not_take_goes_to_the_other_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from quad_kernels.integer_linear import launch

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the kernel for few tokens ran")

    monkeypatch.setattr(launch, "few_tokens_linear", refuse)
    many, ragged, plain = layer(9, 5, 256), layer(1, 5, 254), layer(1, 5, 256)
    packed = replace(layer(1, 5, 256, bits=4), x=pack_nibbles(integers((1, 256), 4, 0)))
    wide = torch.zeros(1, 260, dtype=torch.int8)
    wide[:, 3:-1] = plain.x
    unaligned = replace(plain, x=wide.to(device)[:, 3:-1])
    grouped = replace(plain, x_scale=scales(1, 2, seed=4))
    zero_points = replace(plain, weight=replace(plain.weight, zero_point=torch.ones(5, 1, dtype=torch.int8).to(device)))
    wide_weight = replace(plain, weight=QuantizedWeight(integers((5, 256), 8, 1), plain.weight.scale, None, 256, 5, 8))
    for operands in (many, ragged, packed, unaligned, grouped, zero_points, wide_weight):
        got = launch.integer_linear(moved(operands, device)).cpu()
        assert_rounded_alike(got, reference(moved(operands, torch.device("cpu"))))
    with pytest.raises(AssertionError, match="few tokens ran"):
        launch.integer_linear(moved(plain, device))


def test_a_public_call_runs_it(device: torch.device) -> None:
    operands = layer(2, 40, 256, 64, True, bits=4, dtype=torch.bfloat16)
    on = moved(operands, device)
    got = integer_linear(
        on.x, on.x_scale, on.weight, outlier=on.outlier, outlier_weight=on.outlier_weight, bias=on.bias,
        out_dtype=torch.bfloat16,
    )  # fmt: skip
    assert torch.equal(got.cpu(), run(operands, device))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(28672, 4096), (4160, 14336), (6144, 4096), (256, 2048), (5, 4), (896, 4864), (9216, 131072)],
)
def test_the_default_fits(tokens: int, outputs: int, inputs: int) -> None:
    assert fits(default_config(tokens, outputs, inputs), tokens, inputs)


# --- on a GPU only ---


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (4160, 14336), (896, 4864), (1000, 4000)])
@pytest.mark.parametrize("m", [1, 3, 8])
def test_large_shapes_are_exact(m: int, n: int, k: int, device: torch.device) -> None:
    operands = with_unit_scales(layer(m, n, k))
    wanted = (operands.x.double() @ operands.weight.unpacked().double().T).float()
    for config in CANDIDATES:
        if fits(config, m, k):
            assert torch.equal(run(operands, device, config), wanted), config
            if torch.cuda.get_device_capability(device)[0] == 9:
                assert torch.equal(run(operands, device, config._replace(early=True)), wanted), config
