"""Checkpoints of toy models, written from their specification alone: llm-compressor is not in vLLM's environment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import quad_modifiers  # noqa: F401  (teaches transformers the format)
from quad_modifiers.checkpoint.format import InputFormat, LinearFormat, QuadFormat, TableFormat, WeightFormat
from quad_modifiers.checkpoint.models import quad_model_type, set_tripwire
from quad_modifiers.checkpoint.tensors import expected_tensors
from quad_modifiers.model.architecture import BUILTIN_ARCHITECTURES
from quad_modifiers.nn.packed_shapes import TensorSpec

KNOWN = {architecture.model_type: architecture for architecture in BUILTIN_ARCHITECTURES}
W4, A4 = WeightFormat(bits=4), InputFormat(bits=4, clip_ratio=0.9)

# 8 outliers and 64 residual coordinates; 4 heads of 32; an intermediate size that fills no whole word of zero points.
RANK, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 8, 72, 4, 2, 32, 100


def toy_format(
    base: str,
    weight: WeightFormat | None,
    quantized: InputFormat | None,
    packed_ends: bool,
    shared_table: bool = False,
    **changes: Any,
) -> QuadFormat:
    """Return a `quad` section; `changes` replaces fields of single roles, `o_proj={"hadamard": False}`."""
    heads, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    sizes = {"stream": HIDDEN, "queries": heads, "keys": kv, "values": kv, "channels": INTERMEDIATE}
    common = {"weight": weight, "input": quantized, "bias": False}
    stream = {
        "in_features": HIDDEN,
        "outliers_per_block": RANK,
        "block": HIDDEN,
        "keep_width": False,
        "hadamard": False,
    }
    d_type = {"keep_width": True, "hadamard": True}
    inputs = {
        "stream": stream,
        "values": {**d_type, "in_features": heads, "outliers_per_block": 4, "block": HEAD_DIM},
        "channels": {**d_type, "in_features": INTERMEDIATE, "outliers_per_block": 12, "block": INTERMEDIATE},
    }
    linears = {}
    for group, member in KNOWN[base].quantized_members():
        own = {"out_features": sum(sizes[space] for space in member.produces)}
        own["bias"] = base == "qwen2" and group.name == "qkv"
        linears[member.role] = LinearFormat(**{**common, **inputs[group.reads], **own, **changes.get(member.role, {})})
    ends: dict[str, Any] = {"embedding": TableFormat(), "head": TableFormat()} if packed_ends else {}
    if shared_table:
        ends["sections"] = {"head_transform": {}}
    if "overrides" in changes:
        ends["overrides"] = changes["overrides"]
    return QuadFormat.lowest(base_model_type=base, residual_basis=None, linears=linears, **ends)


def _toy_config(base: str, quad: QuadFormat, dtype: torch.dtype, **overrides: Any) -> Any:
    biases = {"attention_bias": quad.linears["q_proj"].bias} if base in ("llama", "qwen3") else {}
    settings = {
        "vocab_size": 320,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "architectures": [_class_name(base)],
    }
    return CONFIG_MAPPING[quad_model_type(base)](dtype=dtype, **{**settings, **biases, **overrides})


def _class_name(base: str) -> str:
    return f"Quad{MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base]].__name__}"


def _random(name: str, spec: TensorSpec, generator: torch.Generator) -> torch.Tensor:
    if spec.value is not None:
        return torch.tensor(spec.value, dtype=spec.dtype)
    if spec.dtype == torch.uint8 and name.endswith("weight_scale"):  # exponents of e8m0
        return torch.randint(120, 124, spec.shape, generator=generator, dtype=torch.uint8)
    if not spec.dtype.is_floating_point:
        words = torch.randint(-(2**31), 2**31, spec.shape, generator=generator, dtype=torch.int64)
        return words.to(spec.dtype)
    if name.endswith("weight_global_scale"):
        return torch.full(spec.shape, 2.0 ** int(torch.randint(3, 6, (1,), generator=generator)))
    if name.endswith("weight_scale"):
        largest = 0.03 if ".residual." in name else 0.002  # logits of order one, as those of a floating-point head
        return (largest * (0.3 + 0.7 * torch.rand(spec.shape, generator=generator))).to(spec.dtype)
    if name.endswith("norm.weight") or len(spec.shape) == 0:
        return torch.ones(spec.shape, dtype=spec.dtype)
    width = 4.0 if name.endswith(".bias") else spec.shape[-1]
    return (torch.randn(spec.shape, generator=generator) / width**0.5).to(spec.dtype)


def _write(
    folder: Path, quad: QuadFormat, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> dict[str, torch.Tensor]:
    config = _toy_config(quad.base_model_type, quad, dtype, **overrides)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _random(name, spec, generator) for name, spec in expected_tensors(config, quad, KNOWN).items()}
    folder.mkdir(parents=True)
    content = json.loads(config.to_json_string())
    content["quantization_config"] = {"quant_method": "quad", "format": "pack-quantized", "quad": quad.section()}
    set_tripwire(content)
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.fixture(scope="session")
def write_toy(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer) -> Callable[..., Path]:
    """Return `write_toy(quad, dtype=float32, seed=0, **config)`: a folder with a random QUAD checkpoint."""

    def write(quad: QuadFormat, **arguments: Any) -> Path:
        folder = tmp_path_factory.mktemp("toy") / quad.base_model_type
        _write(folder, quad, **arguments)
        toy_tokenizer.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="session")
def toy_quad() -> Callable[..., QuadFormat]:
    """Return `toy_quad(base="llama", weight=W4, quantized=A4, packed_ends=False, shared_table=False,
    role={field: value})`.
    """

    def make(
        base: str = "llama",
        weight: WeightFormat | None = W4,
        quantized: InputFormat | None = A4,
        packed_ends: bool = False,
        **changes: Any,
    ) -> QuadFormat:
        return toy_format(base, weight, quantized, packed_ends, **changes)

    return make


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The checkpoint to serve, $QUAD_VLLM_CHECKPOINT; `make test-vllm` makes one and sets it."""
    pytest.importorskip("vllm")
    folder = os.environ.get("QUAD_VLLM_CHECKPOINT")
    if not folder:
        pytest.fail("QUAD_VLLM_CHECKPOINT names no checkpoint to serve: run `make test-vllm`, or set it to a folder")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`load(folder, dtype="auto")`: the model as a vLLM worker of one rank holds it."""
    pytest.importorskip("vllm")
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    patch = pytest.MonkeyPatch()
    if not torch.accelerator.is_available():  # what vLLM's CPU worker does, which this fixture stands in for
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
    started = False

    def run(folder: Path, dtype: str = "auto", **arguments: Any) -> Any:
        nonlocal started
        config = EngineArgs(model=str(folder), dtype=dtype, enforce_eager=True, **arguments).create_engine_config()
        with set_current_vllm_config(config):
            if not started:
                store = tmp_path_factory.mktemp("gloo") / "store"
                init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
                initialize_model_parallel(1)
                started = True
            return get_model(vllm_config=config)

    yield run
    patch.undo()
    destroy_model_parallel()
    destroy_distributed_environment()
