"""A layer with a low-rank branch: its numbers on every backend, its gradients, and in one native call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quad_kernels import InputQuantization, InputSplit, LowRank, RMSNorm, choose_backend, quad_linear, split_input

from .native_weights import MISSING, in_lines, random_weight, results_everywhere

OUT = 40
LOW = InputQuantization(4, 0.9)
SPLITS = {
    "no outliers": InputSplit(96),
    "stream": InputSplit(104, 8),
    "odd": InputSplit(77, 5),
    "Hadamard": InputSplit(96, 8, 48, keep_width=True, hadamard=True),
}
NATIVE = pytest.mark.skipif(MISSING is not None, reason=f"no native kernels: {MISSING}")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(split: InputSplit, dtype: torch.dtype, rank: int, tokens: int = 6, out: int = OUT) -> dict[str, Any]:
    """Arguments of `quad_linear`; the branch is as large as the rest of the layer."""
    weight = random_weight(out, split.residual_width, 4)
    weight.scale.mul_(0.1)
    return {
        "x": draw(tokens, split.width).to(dtype),
        "weight": weight,
        "split": split,
        "quantization": LOW,
        "outlier_weight": draw(out, split.rank, seed=1).to(dtype) if split.rank else None,
        "bias": draw(out, seed=2).to(dtype),
        "branch": LowRank((draw(rank, split.width, seed=3) / 3).to(dtype), draw(out, rank, seed=4).to(dtype)),
    }


def truth(given: dict[str, Any], backend: str) -> torch.Tensor:
    """The layer without its branch, which other tests know, and the branch in float64 behind one rounding of x B^T."""
    x, (down, up) = given["x"], given["branch"]
    rest = quad_linear(**(given | {"x": x.float(), "branch": None, "backend": backend}))
    inner = (x.double() @ down.double().T).to(x.dtype)
    return rest.double() + inner.double() @ up.double().T


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """One rounding to the dtype, and now and then another last bit of x B^T."""
    bound = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[found.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=bound, atol=4 * bound)


@pytest.mark.parametrize("backend", ["reference", "onednn", "native", "triton"])
@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_backend_adds_it(
    dtype: torch.dtype, name: str, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("with a GPU the kernels are compiled")
        monkeypatch.setenv("QUAD_KERNELS_CACHE", str(tmp_path))
    # Triton's interpreter takes half a minute for a few tokens, whose kernel is another; one layer of them is enough.
    few = backend != "triton" or (name, dtype) == ("stream", torch.float32)
    given = layer(SPLITS[name], dtype, rank=10, tokens=6 if few else 18)
    given["weight"] = choose_backend("cpu", backend).prepare_weight(given["weight"], LOW)
    if SPLITS[name].hadamard and dtype == torch.bfloat16:  # rounded behind the transform: no float32 is like it
        x, (down, up) = given["x"], given["branch"]
        rest = quad_linear(**(given | {"branch": None, "backend": backend})).double()
        wanted = rest + (x.double() @ down.double().T).bfloat16().double() @ up.double().T
    else:
        wanted = truth(given, backend)
    got = quad_linear(**given, backend=backend)
    assert got.dtype == dtype
    assert_close(got, wanted)
    assert float((got.double() - quad_linear(**(given | {"branch": None}), backend=backend).double()).norm()) > 1


@NATIVE
@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_native_result_depends_on_the_batch_the_threads_or_the_processor(dtype: torch.dtype, rank: int) -> None:
    given = layer(InputSplit(203, 3), dtype, rank, tokens=70, out=150)
    given["weight"] = in_lines(given["weight"])
    results = list(results_everywhere(given, threads=(1, 3), tokens=(1, 19)))
    for result in results[1:]:
        assert torch.equal(result, results[0])
    if dtype != torch.float16:
        assert_close(results[0], truth(given, "native"))


@pytest.mark.parametrize("name", SPLITS)
def test_gradients(name: str) -> None:
    """Of a layer and its branch written down apart."""
    results = []
    for joined in (True, False):
        given = layer(SPLITS[name], torch.float32, rank=6)
        leaves = [given["x"], *given["branch"], given["bias"]]
        for leaf in leaves:
            leaf.requires_grad_()
        branch = given["branch"]
        y = quad_linear(**(given if joined else given | {"branch": None}))
        if not joined:
            y = y + given["x"] @ branch.down.T @ branch.up.T
        (y * draw(6, OUT, seed=5)).sum().backward()
        results.append([y.detach()] + [leaf.grad for leaf in leaves])
    with torch.no_grad():
        results[0].append(quad_linear(**given))
        results[1].append(results[1][0])
    for ours, apart in zip(*results, strict=True):
        torch.testing.assert_close(ours, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["nibbles", "onednn", "lines4"])
def test_in_a_compiled_graph_and_behind_a_norm(layout: str) -> None:
    given = layer(SPLITS["stream"], torch.float32, rank=6)
    given["weight"] = given["weight"].to_layout(layout)
    norm = RMSNorm(1 + draw(104, seed=7) / 10, 1e-5)
    torch._dynamo.reset()

    def run(x: torch.Tensor, norm: RMSNorm | None = None) -> torch.Tensor:
        return quad_linear(**(given | {"x": x, "norm": norm}))

    x = draw(4, 104)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))
        assert torch.equal(run(x, norm), run(norm(x)))


def test_beside_outliers_of_8_bits() -> None:
    split = SPLITS["stream"]
    given = layer(split, torch.float32, rank=6)
    wide = InputQuantization(8)
    given |= {"outlier_weight": random_weight(OUT, split.rank, 8, seed=9), "outlier_quantization": wide}
    given["outlier_weight"].scale.mul_(0.01)
    x, (down, up) = given["x"], given["branch"]
    got = quad_linear(**given)
    outlier, _ = split_input(x, split)
    assert outlier is not None
    torch.testing.assert_close(got, quad_linear(**(given | {"branch": None})) + x @ down.T @ up.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "branch",
    [
        LowRank(draw(6, 103), draw(OUT, 6)),
        LowRank(draw(6, 104), draw(OUT, 5)),
        LowRank(draw(6, 104), draw(OUT + 1, 6)),
        LowRank(draw(6, 104), draw(OUT, 6).bfloat16()),
    ],
    ids=["inputs", "rank", "outputs", "dtypes"],
)
def test_one_that_does_not_fit_is_refused(branch: LowRank) -> None:
    with pytest.raises(ValueError, match="does not fit 104 inputs and 40 output channels, or has two dtypes"):
        quad_linear(**(layer(SPLITS["stream"], torch.float32, rank=6) | {"branch": branch}))
