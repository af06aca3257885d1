"""The benchmark harness on toy shapes: what it times is right, what is wrong it does not time, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from quad_kernels import LinearOperands, choose_backend

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`benchmarks` is not installed; it is run with PYTHONPATH=kernels. The backend is the device's own."""
    monkeypatch.syspath_prepend(str(ROOT / "kernels"))
    monkeypatch.delenv("QUAD_KERNELS", raising=False)
    yield
    torch.set_grad_enabled(True)


TOY = ["--models", "toy", "--device", "cpu", "--repeats", "3", "--ceiling-size", "512"]


def run(*arguments: str) -> int:
    from benchmarks.run import main

    return main([*TOY, *arguments])


def test_every_case_is_measured_with_its_origin_ceiling_and_shares(tmp_path: Path, capsys) -> None:
    output = tmp_path / "rows.jsonl"
    assert run("--tokens", "1", "3", "--output", str(output), "--commit", "abc") == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    cases = ("qkv", "o", "gate_up", "down", "attention", "mlp")
    assert [(row["case"], row["tokens"]) for row in rows] == [(f"toy/{c}", m) for c in cases for m in (1, 3)]
    for row in rows:
        assert {"machine", "torch", "triton", "driver", "commit", "date", "backend"} <= row.keys()
        assert row["commit"] == "abc"
        assert not row["failed"]
        assert {"quad", "bf16", "fp32"} <= row["methods"].keys()
        assert 0 < row["fraction"] < 1
        assert row["fraction"] == pytest.approx(row["least_seconds"] / row["methods"]["quad"]["median"])
        linear = row["case"].split("/")[1] in ("qkv", "o", "gate_up", "down")
        assert ("share_outliers" in row) == ("share_quantization" in row) == ("int8" in row["methods"]) == linear
    printed = capsys.readouterr().out
    assert printed.count("| toy/") == len(rows)
    assert "12 of 12 rows are correct" in printed


def test_a_wrong_kernel_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setenv("QUAD_KERNELS", "onednn")
    backend = choose_backend("cpu")
    right = backend.integer_linear

    def wrong(operands: LinearOperands) -> torch.Tensor:
        y = right(operands)
        if operands.weight.out_features == 512:
            y[-1, -1] += 0.5 * y.abs().max()
        return y

    monkeypatch.setattr(backend, "integer_linear", wrong)
    output = tmp_path / "rows.jsonl"
    assert run("--tokens", "2", "--output", str(output)) == 1
    rows = {row["case"]: row for row in map(json.loads, output.read_text().splitlines())}
    for case in ("toy/gate_up", "toy/mlp"):
        assert "differs from the reference" in rows[case]["failed"]["gate"]
        assert not rows[case]["methods"]
    assert "quad" in rows["toy/down"]["methods"]
    printed = capsys.readouterr().out
    assert "| toy/gate_up | 2 | FAILED: the result differs" in printed


@pytest.mark.parametrize(
    ("part", "message"),
    [("integers", "of the integers differ"), ("scale", "scales differ"), ("outlier", "outlier coordinates differ")],
)
def test_the_gate_sees_a_wrong_quantizer(monkeypatch: pytest.MonkeyPatch, part: str, message: str) -> None:
    from benchmarks import gate
    from benchmarks.methods import QuadLayer, Setting
    from benchmarks.shapes import MODELS

    generator = torch.Generator().manual_seed(0)
    layer = QuadLayer(MODELS["toy"].linears()["qkv"], Setting(torch.device("cpu"), torch.bfloat16, 1), generator)
    x = layer.make_input(5, generator)
    assert gate.check(layer, x, exact=True) is None
    backend = choose_backend("cpu")
    right = backend.quantize_activations

    def wrong(*arguments):  # type: ignore[no-untyped-def]
        outlier, integers, scale = right(*arguments)
        changed = {"outlier": outlier, "integers": integers, "scale": scale}[part]
        changed[-1, -1] += 1
        return outlier, integers, scale

    monkeypatch.setattr(backend, "quantize_activations", wrong)
    assert message in (gate.check(layer, x, exact=True) or "")


def test_a_wrong_integer_sum_is_seen_where_the_dtype_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gate
    from benchmarks.methods import QuadLayer, Setting
    from benchmarks.shapes import MODELS

    backend = choose_backend("cpu")
    right = backend.integer_linear
    monkeypatch.setattr(backend, "integer_linear", lambda *a: right(*a) * (1 + 1e-4))
    generator = torch.Generator().manual_seed(0)
    layer = QuadLayer(MODELS["toy"].linears()["down"], Setting(torch.device("cpu"), torch.bfloat16, 1), generator)
    x = layer.make_input(5, generator)
    assert gate.check(layer, x, exact=False) is None
    assert gate.check(layer, x, exact=True) == "integer sums differ from the reference"


def test_rows_of_an_earlier_run_stay_and_the_same_case_is_replaced(tmp_path: Path) -> None:
    from benchmarks.record import add_row, read_rows

    path = tmp_path / "folder" / "rows.jsonl"
    for case, tokens, value in (("a", 1, 1), ("a", 2, 2), ("b", 1, 3), ("a", 1, 4)):
        add_row(path, {"machine": "m", "case": case, "tokens": tokens, "value": value})
    assert sorted(row["value"] for row in read_rows(path)) == [2, 3, 4]
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    path.write_text(path.read_text() + "{half a li")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 4"):
        read_rows(path)


def test_time_limit_keeps_what_was_measured(tmp_path: Path, capsys) -> None:
    output = tmp_path / "rows.jsonl"
    assert run("--tokens", "1", "2", "--seconds", "0", "--output", str(output)) == 2
    assert "out of time before toy/qkv" in capsys.readouterr().err
    assert run("--tokens", "1", "2", "--seconds", "0.001", "--output", str(output)) in (0, 2)


def test_shapes_are_those_of_the_default_recipe_and_of_the_models() -> None:
    from benchmarks import shapes

    recipe = yaml.safe_load((ROOT / "recipes" / "quad_w4a4.yaml").read_text())["quad_stage"]["quad_modifiers"]
    projection, activations = recipe["SVDOutlierProjection"], recipe["DynamicActQuant"]
    assert projection["rank"] == shapes.RANK
    assert projection["o_proj_rank_per_head"] == shapes.O_PROJ_RANK_PER_HEAD
    assert projection["down_proj_rank"] == shapes.DOWN_PROJ_RANK
    assert recipe["OutlierSplitGPTQ"]["bits"] == shapes.WEIGHT_BITS
    assert activations["u_type_bits"] == activations["d_type_bits"] == shapes.QUANTIZATION.bits
    assert activations["u_type_clip_ratio"] == activations["d_type_clip_ratio"] == shapes.QUANTIZATION.clip_ratio
    llama = shapes.MODELS["llama-3-8b"].linears()
    sizes = {name: (linear.inputs, linear.outputs, linear.split.rank) for name, linear in llama.items()}
    assert sizes == {
        "qkv": (4096, 6144, 64),
        "o": (4096, 4096, 256),
        "gate_up": (4096, 28672, 64),
        "down": (14336, 4096, 64),
    }
    with pytest.raises(ValueError, match="no model 'gpt'"):
        shapes.cases("gpt")


def test_least_time_counts_traffic_and_arithmetic() -> None:
    from benchmarks.ceiling import Ceiling, least_seconds
    from benchmarks.shapes import SQUARE, cases

    (case,) = cases(SQUARE)
    bound_by_memory = Ceiling(1e9, 5e8, 1e18, 1e18)
    traffic = 4096 * 4096 / 2 + 2 * 4096 * (64 + 1) + 2 * (4160 + 4096)
    assert least_seconds(case, 1, torch.bfloat16, bound_by_memory) == pytest.approx(traffic / 1e9)
    bound_by_products = Ceiling(1e18, 1e18, 1e12, 1e11)
    arithmetic = 2 * 512 * 4096 * (4096 / 1e12 + 64 / 1e11)
    assert least_seconds(case, 512, torch.bfloat16, bound_by_products) == pytest.approx(arithmetic)


def test_methods_are_interleaved_and_a_failing_one_costs_only_itself() -> None:
    from benchmarks.timing import Method, measure

    order: list[str] = []

    class Fixed:
        mode = "wall clock"

        def __init__(self, method: Method) -> None:
            self.name = method.name
            method.call(0)

        def sample(self) -> float:
            order.append(self.name)
            return {"a": 1.0, "b": 2.0}[self.name]

    def fail(_: int) -> None:
        raise RuntimeError("no such kernel\nand details")

    methods = [Method("a", lambda _: None, 1), Method("b", lambda _: None, 1), Method("broken", fail, 1)]
    timings, failed = measure(methods, Fixed, repeats=5)
    assert {name: timing.median for name, timing in timings.items()} == {"a": 1.0, "b": 2.0}
    assert failed == {"broken": "RuntimeError: no such kernel"}
    assert [sorted(order[i : i + 2]) for i in range(0, 10, 2)] == [["a", "b"]] * 5


def test_calls_rotate_through_the_copies() -> None:
    from benchmarks.timing import Method, WallClock

    seen: set[int] = set()
    sampler = WallClock(Method("m", seen.add, 5))
    for _ in range(3):
        assert sampler.sample() > 0
    assert seen == set(range(5))


class FakeCuda:
    """As much of torch.cuda as the timers use, with a clock that the calls advance."""

    def __init__(self) -> None:
        self.milliseconds = 0.0
        self.graph_calls: list[Callable[[], None]] | None = None
        self.waited = 0

    def work(self, milliseconds: float) -> None:
        if self.graph_calls is not None:
            self.graph_calls.append(lambda: self.work(milliseconds))
        else:
            self.milliseconds += milliseconds

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = types.SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.milliseconds)
        event.synchronize = lambda: None
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def CUDAGraph(self) -> Any:
        graph = types.SimpleNamespace(calls=[])
        graph.replay = lambda: [call() for call in graph.calls]
        return graph

    def Stream(self) -> Any:
        return types.SimpleNamespace(wait_stream=lambda other: setattr(self, "waited", self.waited + 1))

    current_stream = Stream

    def synchronize(self) -> None:
        pass

    def stream(self, stream: Any) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def graph(self, graph: Any) -> Any:
        import contextlib

        @contextlib.contextmanager
        def capture() -> Iterator[None]:
            self.graph_calls = graph.calls
            yield
            self.graph_calls = None

        return capture()


@pytest.mark.parametrize("milliseconds", [0.01, 1.0, 30.0])
def test_cuda_timers_return_seconds_per_call(milliseconds: float) -> None:
    from benchmarks.timing import CudaEager, CudaGraph, Method

    cuda, seen = FakeCuda(), set()

    def call(copy: int) -> None:
        seen.add(copy)
        cuda.work(milliseconds)

    for sampler in (CudaEager, CudaGraph):
        seen.clear()
        timer = sampler(Method("m", call, 7), cuda)
        assert timer.sample() == pytest.approx(milliseconds / 1e3)
        assert seen == set(range(7)) or milliseconds > 1
    assert cuda.waited == 2


def test_a_gpu_row_has_graph_and_eager_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA branch of a row, with the CPU in the place of the GPU."""
    from benchmarks import run as module
    from benchmarks.shapes import cases
    from benchmarks.timing import CudaEager, CudaGraph

    cuda = FakeCuda()

    def counted(method):  # type: ignore[no-untyped-def]
        def call(copy: int) -> None:
            if cuda.graph_calls is None:
                method.call(copy)
            cuda.work(0.5)

        return type(method)(method.name, call, method.copies)

    monkeypatch.setattr(module, "CudaGraph", lambda method: CudaGraph(counted(method), cuda))
    monkeypatch.setattr(module, "CudaEager", lambda method: CudaEager(counted(method), cuda))
    bench = module.Bench(module.parse([*TOY, "--tokens", "1"]))
    bench.graphs = True
    (row,) = bench.rows(cases("toy")[0], [1])
    assert row["methods"]["quad"]["mode"] == "cuda graph"
    assert row["eager"]["bf16"]["mode"] == "cuda eager"
    assert "quad: integer product only" not in row["eager"]
    assert module.table([row]).count("|") > 20


def test_a_peer_that_is_missing_costs_nothing(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from benchmarks import run as module
    from benchmarks.shapes import cases

    monkeypatch.setitem(sys.modules, "humming", None)
    bench = module.Bench(module.parse([*TOY, "--tokens", "1"]))
    bench.options.peers = True
    (row,) = bench.rows(cases("toy")[0], [1])
    assert "quad" in row["methods"]
    assert row["failed"].keys() == {"humming_w4a4", "humming_w4a8", "humming_w4a16"}
    assert "without humming_w4a4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        module.parse([*TOY, "--peers"])


class StandInLayer(torch.nn.Module):
    """The interface of humming-kernels 0.1.19 that is used, in plain PyTorch."""

    def __init__(self, shape_n: int, shape_k: int, weight_config: dict, input_config: dict | None, torch_dtype) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        assert weight_config == {"dtype": "int4"}
        assert input_config in (None, {"dtype": "int4"}, {"dtype": "int8"})
        self.weight = torch.nn.Parameter(torch.empty(shape_n, shape_k, dtype=torch_dtype), requires_grad=False)
        self.humming_config = types.SimpleNamespace(to_str=lambda: "{}")
        self.factor = 1.0

    def load_from_unquantized(self, tensor: torch.Tensor) -> None:
        self.weight.copy_(tensor)

    def transform(self) -> None:
        pass

    def forward(self, inputs: torch.Tensor, tuning_config: dict) -> torch.Tensor:
        assert tuning_config == {"block": len(inputs)}
        return self.factor * inputs @ self.weight.T


@pytest.fixture
def humming(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the package; the list collects what is compiled."""
    compiled: list[Any] = []

    class Kernel:
        _resolve_configs = staticmethod(lambda layer, compute, tuning: ({"layer": layer}, {}, tuning))
        compile_many = staticmethod(compiled.extend)

    modules = {
        "humming": {},
        "humming.layer": {"HummingLayer": StandInLayer},
        "humming.tune": {"get_heuristics_config": lambda config, shape_m: {"block": shape_m}},
        "humming.kernel": {},
        "humming.kernel.humming": {"HummingKernel": Kernel},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return compiled


def test_the_peer_is_timed_once_per_arithmetic_within_its_budget(humming: list[Any], monkeypatch) -> None:
    from benchmarks import run as module
    from benchmarks.shapes import cases

    bench = module.Bench(module.parse([*TOY, "--tokens", "1", "2"]))
    bench.options.peers = True
    rows = list(bench.rows(cases("toy")[-1], [1, 2]))
    assert {"humming_w4a4", "humming_w4a8", "humming_w4a16"} <= rows[1]["methods"].keys()
    assert len(humming) == 3 * 2 * 2  # arithmetics, linears, numbers of tokens
    bench.budget.spend(1e9)
    (row, _) = bench.rows(cases("toy")[0], [1, 2])
    assert "--peer-seconds" in row["failed"]["humming_w4a4"]
    monkeypatch.setattr(StandInLayer, "forward", lambda self, inputs, tuning_config: -inputs @ self.weight.T)
    (row, _) = module.Bench(bench.options).rows(cases("toy")[0], [1, 2])
    assert "not called as it should be" in row["failed"]["humming_w4a8"]


def test_tables_print_files_and_say_so_where_there_is_nothing(tmp_path: Path, capsys) -> None:
    from benchmarks.report import main

    output = tmp_path / "rows.jsonl"
    run("--tokens", "1", "--cases", "qkv", "--output", str(output))
    capsys.readouterr()
    assert main([str(output)]) == 0
    assert "| toy/qkv | 1 |" in capsys.readouterr().out
    assert main([str(tmp_path / "none.jsonl")]) == 1


def test_candidates_are_compiled_once_per_kernel() -> None:
    pytest.importorskip("triton")
    from benchmarks.tune import candidates_to_compile, shapes

    wanted = shapes(["llama-3-8b", "llama-3.2-1b"], [1, 16, 2048])
    assert {shape.tokens for shape in wanted} == {16, 2048}
    work = candidates_to_compile(wanted, "cpu", torch.bfloat16)
    assert len({config for _, config in work}) <= len(work) < 8 * len(wanted)


def test_committed_results_are_readable() -> None:
    from benchmarks.record import read_rows
    from benchmarks.report import table

    files = sorted((ROOT / "docs" / "benchmarks").glob("kernels-*.jsonl"))
    assert files
    for path in files:
        rows = read_rows(path)
        assert rows
        assert not any(row["failed"].get("gate") for row in rows)
        committed = path.with_suffix(".md").read_text(encoding="utf-8")
        for line in table(rows).splitlines():
            if line.startswith("|"):
                assert line in committed, f"{path.with_suffix('.md').name} is older than {path.name}: make it again"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU timeout")
def test_every_phase_of_the_gpu_script_runs_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    script = ROOT / "kernels" / "benchmarks" / "gpu_check.sh"
    result = subprocess.run(
        ["bash", str(script), "--dry"], capture_output=True, text=True, env=environment, timeout=900
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "FAILED" not in result.stdout
    assert "out of time" not in result.stdout
    assert {"log.txt", "report.txt", "untuned.jsonl", "tuned.jsonl"} <= {f.name for f in (tmp_path / "out").iterdir()}
    assert "| toy/mlp | 9 |" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU timeout")
def test_the_gpu_script_of_whole_models_runs_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    script = ROOT / "kernels" / "benchmarks" / "gpu_model.sh"
    command = ["bash", str(script), "--dry"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout[-3000:]
    (row,) = [json.loads(line) for line in (tmp_path / "models.jsonl").read_text().splitlines()]
    assert not row.get("failed")
    assert set(row["decode"]) == set(row["prefill"]) == {"bf16", "quad", "bf16_eager", "quad_eager"}
