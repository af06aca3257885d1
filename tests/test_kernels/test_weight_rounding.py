"""The rounding of weights, in the reference and natively."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from quad_kernels import descend_columns, round_columns, rounding_errors
from quad_kernels.native import library

try:
    library.load()
    INSTRUCTION_SETS = library.supported()
except library.NativeLibraryError:
    INSTRUCTION_SETS = []
LOW, HIGH = -8, 7


@pytest.fixture(params=["reference", *INSTRUCTION_SETS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the backend to ask for, with one instruction set chosen where it is native."""
    if request.param == "reference":
        yield "reference"
        return
    before = library.instruction_set()
    library.choose_instruction_set(request.param)
    yield "native"
    library.choose_instruction_set(before)


def draw(columns: int, out: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Values, a symmetric positive matrix, scales and zero points with few bits: sums of their products are exact."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator).float()

    half = integers(-2, 3, columns, columns)
    return (
        integers(-40, 41, columns, out) / 4,
        half @ half.T / 4 + columns * torch.eye(columns),
        2.0 ** integers(-1, 2, columns, out),
        integers(-2, 3, columns, out),
    )


def rounded_alone(values, factor, scale, zero_point) -> tuple[list[list[int]], list[list[float]]]:
    """Number by number, in Python's floats."""
    work, integers, errors = values.tolist(), [], []
    for i, row in enumerate(work):
        integers.append(
            [
                max(LOW, min(HIGH, round(w / s + z)))
                for w, s, z in zip(row, scale[i].tolist(), zero_point[i].tolist(), strict=True)
            ]
        )
        errors.append(
            [
                (w - (q - z) * s) / factor[i, i].item()
                for w, q, s, z in zip(row, integers[i], scale[i].tolist(), zero_point[i].tolist(), strict=True)
            ]
        )
        for j in range(i + 1, len(work)):
            work[j] = [w - factor[i, j].item() * e for w, e in zip(work[j], errors[i], strict=True)]
    return integers, errors


@pytest.mark.parametrize(("columns", "out"), [(1, 1), (5, 16), (6, 33), (4, 15)])
def test_errors_are_carried_to_later_columns(backend: str, columns: int, out: int) -> None:
    values, _, scale, zero_point = draw(columns, out)
    factor = (torch.arange(columns * columns).reshape(columns, columns) % 3 / 2).triu(1) + torch.eye(columns) * 2
    before = values.clone()
    integers, errors = round_columns(values, factor, scale, zero_point, low=LOW, high=HIGH, backend=backend)
    wanted, wanted_errors = rounded_alone(values, factor, scale, zero_point)
    assert integers.tolist() == wanted
    assert errors.tolist() == wanted_errors
    assert torch.equal(values, before), "the columns stay as they are"


@pytest.mark.parametrize(("columns", "out"), [(1, 3), (8, 16), (7, 50)])
def test_descent_leaves_no_integer_that_alone_could_do_better(backend: str, columns: int, out: int) -> None:
    target, hessian, scale, _ = draw(columns, out)
    integers = torch.zeros(columns, out)
    for _ in range(50):
        gradient = hessian @ (integers * scale - target)
        inverse_step = 1 / (hessian.diagonal().unsqueeze(1) * scale)
        moved, change = descend_columns(
            integers, gradient, hessian, scale, inverse_step, low=LOW, high=HIGH, backend=backend
        )
        torch.testing.assert_close(change, (moved - integers) * scale, rtol=0, atol=0)
        integers = moved
        if not change.any():
            break
    else:
        pytest.fail("the descent does not come to rest")

    def loss(candidate: torch.Tensor) -> torch.Tensor:
        delta = (candidate * scale - target).double()
        return (delta * (hessian.double() @ delta)).sum(0)

    for column in range(columns):
        for step in (-1, 1):
            candidate = integers.clone()
            candidate[column] = (candidate[column] + step).clamp(LOW, HIGH)
            assert (loss(candidate) >= loss(integers) - 1e-6).all()


@pytest.mark.parametrize(("out", "group_size", "groups"), [(1, 1, 1), (3, 16, 1), (5, 33, 2), (2, 7, 3), (40, 200, 1)])
def test_what_each_scale_costs(backend: str, out: int, group_size: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(2)
    width, trials = group_size * groups, 4

    def integers(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator).float()

    # Few bits: every product and sum is exact, in any order.
    weight, cost = integers(-80, 81, out, width) / 8, integers(0, 4, width)
    scale, zero_point = 2.0 ** integers(-2, 2, trials, out, groups), integers(-3, 4, trials, out, groups)
    found = rounding_errors(weight, scale, zero_point, cost, low=LOW, high=HIGH, backend=backend)
    assert found.shape == (trials, out, groups)
    for trial in range(trials):
        for row in range(out):
            for group in range(groups):
                s, z = scale[trial, row, group].item(), zero_point[trial, row, group].item()
                part = range(group * group_size, (group + 1) * group_size)
                wanted = 0.0
                for column in part:
                    w = weight[row, column].item()
                    rounded = (max(LOW, min(HIGH, round(w / s + z))) - z) * s
                    wanted += cost[column].item() * (rounded - w) ** 2
                assert found[trial, row, group].item() == wanted


@pytest.mark.skipif(not INSTRUCTION_SETS, reason="no native kernels")
def test_no_result_depends_on_the_instruction_set_or_the_threads() -> None:
    generator = torch.Generator().manual_seed(1)
    columns, out = 96, 200
    values, scale = torch.randn(columns, out, generator=generator), torch.rand(columns, out, generator=generator) + 0.1
    samples = torch.randn(300, columns, generator=generator)
    hessian = samples.T @ samples / 300
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    zero_point = torch.zeros_like(values)
    before, threads = library.instruction_set(), torch.get_num_threads()
    results = []
    try:
        for name in INSTRUCTION_SETS:
            library.choose_instruction_set(name)
            for count in (1, 2):
                torch.set_num_threads(count)
                first = round_columns(values, factor, scale, zero_point, low=LOW, high=HIGH, backend="native")
                step = 1 / (hessian.diagonal().unsqueeze(1) * scale)
                gradient = hessian @ (first[0] * scale - values)
                errors = rounding_errors(
                    values.T,
                    torch.stack([scale.T[:, :1]] * 3),
                    torch.zeros(3, out, 1),
                    hessian.diagonal(),
                    low=LOW,
                    high=HIGH,
                )
                results.append(
                    (errors, *first, *descend_columns(first[0], gradient, hessian, scale, step, low=LOW, high=HIGH))
                )
    finally:
        library.choose_instruction_set(before)
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))
    reference = round_columns(values, factor, scale, zero_point, low=LOW, high=HIGH, backend="reference")
    assert (reference[0] == results[0][1]).float().mean() > 0.99, "but for ties that rounding decides"


def test_what_does_not_fit_is_refused(backend: str) -> None:
    values, hessian, scale, zero_point = draw(4, 8)
    with pytest.raises(ValueError, match=r"must be \[n, out\]"):
        round_columns(values, hessian[:3, :3], scale, zero_point, low=LOW, high=HIGH, backend=backend)
    with pytest.raises(ValueError, match=r"must be \[n, out\]"):
        descend_columns(values, values[:, :7], hessian, scale, scale, low=LOW, high=HIGH, backend=backend)
    with pytest.raises(ValueError, match="float32"):
        round_columns(values.double(), hessian, scale, zero_point, low=LOW, high=HIGH, backend=backend)
    weight, scales = torch.ones(2, 6), torch.ones(3, 2, 2)
    for part, cost in ((scales[:, :1], torch.ones(6)), (torch.ones(3, 2, 4), torch.ones(6)), (scales, torch.ones(5))):
        with pytest.raises(ValueError, match=r"weight \[out, in\]"):
            rounding_errors(weight, part, torch.zeros_like(part), cost, low=LOW, high=HIGH, backend=backend)
    with pytest.raises(ValueError, match="float32"):
        rounding_errors(weight, scales, scales.double(), torch.ones(6), low=LOW, high=HIGH, backend=backend)


MAGNITUDES = [0, 1, 2, 3, 4, 6, 8, 12]
NUMBERS = sorted({sign * value for value in MAGNITUDES for sign in (1, -1)})


def nearest_number(x: float) -> int:
    """Of two that are as near the one with an even code."""
    return min(NUMBERS, key=lambda number: (abs(number - x), MAGNITUDES.index(abs(number)) % 2))


def test_floating_point_numbers_are_the_nearest(backend: str) -> None:
    x = torch.arange(-16, 16, 1 / 8).reshape(1, -1)
    ones, zeros = torch.ones_like(x), torch.zeros_like(x)
    integers, errors = round_columns(x, torch.ones(1, 1), ones, zeros, low=-12, high=12, e2m1=True, backend=backend)
    wanted = [nearest_number(value) for value in x[0].tolist()]
    assert integers.tolist() == [wanted]
    assert torch.equal(errors, x - integers)
    moved, change = descend_columns(
        zeros, -x, torch.ones(1, 1), ones, ones, low=-12, high=12, e2m1=True, backend=backend
    )
    assert moved.tolist() == [wanted]
    assert torch.equal(change, moved)
    cost = torch.linspace(0, 1, x.shape[1])
    scales = torch.tensor([1.0, 0.5]).reshape(2, 1, 1)
    found = rounding_errors(
        x, scales, torch.zeros_like(scales), cost, low=-12, high=12, e2m1=True, backend=backend
    ).flatten()
    for scale, error in zip((1.0, 0.5), found.tolist(), strict=True):
        rounded = torch.tensor([nearest_number(value / scale) * scale for value in x[0].tolist()])
        assert error == pytest.approx(float(((rounded - x[0]).square() * cost).sum()), rel=1e-5)
