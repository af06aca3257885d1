"""Whole engines on toys: compiled, on two ranks, with LoRA adapters; log-probabilities against transformers.

Weights and inputs have 8 bits, so that rounding that falls the other way changes little and values can be compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.format import InputFormat, QuadFormat, WeightFormat
from quad_modifiers.tools.support_table import supported

from .random_adapters import random_adapters
from .served_layers import BRANCHES

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

PROMPTS = torch.randint(3, 320, (6, 40), generator=torch.Generator().manual_seed(7))
# vLLM's class knows no biases.
UNBIASED = {"ernie4_5": {"use_bias": False}}
ENGINE_SECONDS = 400
Engine = Callable[..., torch.Tensor]


class EngineProcess:
    """A process that makes engines (engine_process.py), and what it has printed."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        variables = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CACHE_ROOT": str(folder / "cache"),  # nothing compiled earlier
            **environment,
        }
        command = [sys.executable, str(Path(__file__).with_name("engine_process.py"))]
        self._log = folder / "engine.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=variables, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True
            )

    def answer(self, request: dict[str, Any], file: Path) -> torch.Tensor:
        """Return what an engine answers by way of `file`; fail where it, or the process, fails."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**request, "answer": str(file)}) + "\n")
        self._process.stdin.flush()
        deadline = time.monotonic() + ENGINE_SECONDS
        while not file.exists():
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.1)
        found = json.loads(file.read_text())
        assert not isinstance(found, str), found
        return torch.tensor(found)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def shared_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """A process whose engines run in it, without one of their own."""
    pytest.importorskip("vllm")
    process = EngineProcess(tmp_path_factory.mktemp("engines"), {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    yield process
    process.stop()


@pytest.fixture
def engine(tmp_path: Path, shared_process: EngineProcess) -> Engine:
    """`engine(folder, adapters, **LLM arguments)`: log-probabilities of PROMPTS, `[prompt, position]`.

    With `environment={...}` in a process of its own, which serves as vLLM serves.
    """

    def run(
        folder: Path,
        adapters: list[str | None] | None = None,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> torch.Tensor:
        request = {
            "engine": {"model": str(folder), "max_model_len": 128, "max_num_batched_tokens": 128, **arguments},
            "prompts": PROMPTS.tolist(),
            "adapters": adapters or [None] * len(PROMPTS),
        }
        if environment is None:
            return shared_process.answer(request, tmp_path / "answer.json")
        own = EngineProcess(tmp_path, environment)
        try:
            return own.answer(request, tmp_path / "answer.json")
        finally:
            own.stop()

    return run


@pytest.fixture(scope="module")
def toy8(toy_quad, write_toy) -> Callable[..., Path]:
    """`toy8(base, packed_ends=False, dtype=float32, **config)`: a toy checkpoint with 8-bit weights and inputs."""
    bits: dict[str, Any] = {"weight": WeightFormat(bits=8), "quantized": InputFormat(bits=8, clip_ratio=1.0)}

    def write(base: str, packed_ends: bool = False, **arguments: Any) -> Path:
        quad: QuadFormat = toy_quad(base, packed_ends=packed_ends, **bits)
        return write_toy(quad, **arguments)

    return write


@torch.inference_mode()
def reference(model: Any) -> torch.Tensor:
    """Log-probabilities of each prompt's tokens after the first."""
    logprobs = model(PROMPTS).logits[:, :-1].float().log_softmax(-1)
    return logprobs.gather(-1, PROMPTS[:, 1:, None]).squeeze(-1)


@torch.inference_mode()
def reference_after(model: Any) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary after each prompt."""
    return model(PROMPTS).logits[:, -1].float().log_softmax(-1)


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    difference = (found - wanted).abs()
    tail = difference.quantile(0.95)
    print(f"log-probabilities differ by {difference.median():.4f} (median), {tail:.4f} (95th percentile)")
    assert difference.median() < 0.02
    assert tail < 0.1


@pytest.mark.parametrize("model_type", [row.model_type for row in supported() if row.vllm])
def test_every_type_that_has_a_class(model_type: str, engine: Engine, toy8, toy_settings) -> None:
    settings = toy_settings(model_type) | UNBIASED.get(model_type, {})
    settings.pop("head_dim", None)
    folder = toy8(model_type, **settings)
    found = engine(folder, dtype="float32", enforce_eager=True)
    assert_close(found, reference(AutoModelForCausalLM.from_pretrained(folder)))


def test_compiled_in_half_precision(engine: Engine, toy8) -> None:
    folder = toy8("qwen2", packed_ends=True, dtype=torch.float16)
    found = engine(folder, environment={})
    assert_close(found, reference(AutoModelForCausalLM.from_pretrained(folder)))


def test_two_ranks(engine: Engine, toy8) -> None:
    folder = toy8("llama", packed_ends=True)
    # On the CPU, vLLM wants a NUMA node for each rank unless it is told which cores to use.
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    found = engine(folder, environment=cores, dtype="float32", enforce_eager=True, tensor_parallel_size=2)
    assert_close(found, reference(AutoModelForCausalLM.from_pretrained(folder)))


def test_branches_of_a_fused_checkpoint(engine: Engine, toy_quad, write_toy, toy_settings) -> None:
    roles = {"qkv_proj": 6, "o_proj": 4, "gate_up_proj": 5, "down_proj": 6}
    terms = {role: {"terms": {"low_rank_branch": {"rank": rank}}} for role, rank in roles.items()}
    settings = toy_settings("phi3") | UNBIASED.get("phi3", {})
    settings.pop("head_dim", None)
    quad = toy_quad("phi3", weight=WeightFormat(bits=8), quantized=InputFormat(bits=8, clip_ratio=1.0), **terms)
    folder = write_toy(quad, **settings)
    found = engine(folder, dtype="float32", enforce_eager=True)
    assert_close(found, reference(AutoModelForCausalLM.from_pretrained(folder)))


def test_branches_compiled_on_two_ranks(engine: Engine, toy_quad, write_toy) -> None:
    bits: dict[str, Any] = {"weight": WeightFormat(bits=8), "quantized": InputFormat(bits=8, clip_ratio=1.0)}
    folder = write_toy(toy_quad("llama", **bits, **BRANCHES))
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    found = engine(folder, environment=cores, dtype="float32", tensor_parallel_size=2)
    assert_close(found, reference(AutoModelForCausalLM.from_pretrained(folder)))


def _write_adapter(folder: Path, model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Write a PEFT adapter of rank 4 on all linears of the first block; return its factors by module name."""
    generator, factors = torch.Generator().manual_seed(11), {}
    for name in ("q", "k", "v", "o"):
        factors[f"model.layers.0.self_attn.{name}_proj"] = ()
    for name in ("gate", "up", "down"):
        factors[f"model.layers.0.mlp.{name}_proj"] = ()
    for name in factors:
        linear = model.get_submodule(name)
        first = torch.randn(4, linear.in_features, generator=generator) / linear.in_features**0.5
        factors[name] = first, 0.5 * torch.randn(linear.out_features, 4, generator=generator)
    folder.mkdir()
    tensors = {}
    for name, (first, second) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = first
        tensors[f"base_model.model.{name}.lora_B.weight"] = second
    save_file(tensors, folder / "adapter_model.safetensors")
    roles = sorted({name.rpartition(".")[2] for name in factors})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": roles, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return factors


def test_lora_on_the_full_input_width(engine: Engine, toy8, tmp_path: Path) -> None:
    folder, adapter = toy8("llama", packed_ends=True), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(folder)
    factors = _write_adapter(adapter, model)
    half = len(PROMPTS) // 2
    adapters = [None] * half + [str(adapter)] * (len(PROMPTS) - half)
    # Two slots for adapters: on the CPU, vLLM gives prompts without one the last slot, which must then be empty.
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_logprobs": 320}
    found = engine(folder, adapters, dtype="float32", enforce_eager=True, **lora)

    plain = reference_after(model)
    for name, (first, second) in factors.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, given, output, first=first, second=second: output + given[0] @ first.T @ second.T
        )
    adapted = reference_after(model)
    assert (adapted - plain)[half:].abs().median() > 0.1  # the adapter does something
    assert_close(found[:half], plain[:half])
    assert_close(found[half:], adapted[half:])


def test_outlier_adapters_side_by_side(engine: Engine, toy8, tmp_path: Path) -> None:
    """Two adapters of `quad_peft` and the bare base in one batch; ranks differ from role to role."""
    folder = toy8("llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = reference_after(model)
    adapters = random_adapters(model, tmp_path / "adapters", 0.2, reference_after)
    (first, with_first), (second, with_second) = ((str(where), said) for where, said in adapters.values())
    # The slot after the last adapter serves prompts without one, see above.
    lora = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 3, "max_logprobs": 320}
    order = [None, first, second, second, first, None]
    found = engine(folder, order, dtype="float32", enforce_eager=True, **lora)
    expected = torch.stack([{None: plain, first: with_first, second: with_second}[a][i] for i, a in enumerate(order)])
    assert (with_first - plain).abs().median() > 0.1  # the adapters do something
    assert (with_first - with_second).abs().median() > 0.1
    assert_close(found, expected)
