"""An export with online Hadamards in vLLM's own classes: config, stored matrices and layers.

vLLM's two products for it run on CUDA devices only. PyTorch stands in for them here, so this says nothing of them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from quad_kernels.hadamard import hadamard_matrix
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.export import export_compressed_tensors
from quad_modifiers.checkpoint.format import WeightFormat
from quad_modifiers.vllm_plugin import weight_only

from .served_layers import assert_alike, outputs

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

# Multiples of 32, as vLLM's product of packed weights on the CPU wants it; 192 has no Hadamard matrix of Sylvester's.
HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE = 128, 4, 32, 192
WEIGHT = WeightFormat(bits=4, group_size=32)


def formats(toy_quad: Any) -> Any:
    stream = {"in_features": HIDDEN, "block": HIDDEN, "outliers_per_block": 0, "keep_width": False}
    roles = {
        **{role: {**stream, "out_features": HEADS * HEAD_DIM} for role in ("q_proj",)},
        **{role: {**stream, "out_features": 2 * HEAD_DIM} for role in ("k_proj", "v_proj")},
        **{role: {**stream, "out_features": INTERMEDIATE} for role in ("gate_proj", "up_proj")},
        "o_proj": {**stream, "out_features": HIDDEN},
        "down_proj": {
            **stream,
            "in_features": INTERMEDIATE,
            "block": INTERMEDIATE,
            "out_features": HIDDEN,
        },
    }
    return toy_quad("llama", weight=WEIGHT, quantized=None, **roles)


@pytest.fixture
def products_of_cuda(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """PyTorch in place of vLLM's products on CUDA; the widths that the fast transform was asked for."""
    pytest.importorskip("vllm")
    from vllm import _custom_ops, envs
    from vllm.model_executor.layers.quantization.compressed_tensors.transform import module
    from vllm.model_executor.layers.utils import default_unquantized_gemm

    widths: list[int] = []

    def transform(x: torch.Tensor, inplace: bool = True) -> torch.Tensor:
        widths.append(x.shape[-1])
        return x @ hadamard_matrix(x.shape[-1]).to(x)

    monkeypatch.setattr(_custom_ops, "hadacore_transform", transform)
    monkeypatch.setattr(module, "dispatch_unquantized_gemm", lambda: default_unquantized_gemm)
    monkeypatch.setattr(envs, "VLLM_CPU_INT4_W4A8", False, raising=False)  # which would round the inputs to 8 bits
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")
    torch.cpu._init_amx()  # as vLLM's worker does
    return widths


def test_vllm_s_layers_compute_what_ours_do(products_of_cuda, load, toy_quad, write_toy, tolerance, tmp_path) -> None:
    if not weight_only.is_available():
        pytest.skip("this vLLM has no product of packed weights: the processor has no AVX-512")
    source = write_toy(
        formats(toy_quad),
        dtype=torch.bfloat16,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
    )
    folder: Path = export_compressed_tensors(source, tmp_path / "out", online_hadamard=True)
    served = load(folder)
    assert type(served).__module__.startswith("vllm."), "the plugin has no part in it"
    matrices = [
        layer.mlp.down_proj.down_proj_hadamard_input.weight.partitions[0].data.double() for layer in served.model.layers
    ]
    for matrix in matrices:  # the second layer's comes from the first
        wanted = hadamard_matrix(INTERMEDIATE)
        torch.testing.assert_close(matrix, (wanted.sign() / math.sqrt(INTERMEDIATE)).to(torch.bfloat16).double())
    reference = AutoModelForCausalLM.from_pretrained(source)
    assert_alike(*outputs(served, reference, torch.bfloat16), tolerance(torch.bfloat16))
    assert set(products_of_cuda) == {HEADS * HEAD_DIM}, "of o_proj alone; down_proj has the stored matrix"
