"""Layers that vLLM loaded against the same layers of the transformers model, and a rank's part against the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.format import InputFormat, QuadFormat, WeightFormat
from quad_modifiers.vllm_plugin import weight_only

from .served_layers import BRANCHES, assert_alike, outputs

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

W4, A4 = WeightFormat(bits=4), InputFormat(bits=4, clip_ratio=0.9)
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TWO_LEVELS: dict[str, Any] = {
    "weight": WeightFormat(bits=4, group_size=4, sub_scale_bits=4),
    # Groups of whole lines: the native kernels' own products.
    **{
        role: {"weight": WeightFormat(bits=4, group_size=16, sub_scale_bits=4)}
        for role in ("q_proj", "k_proj", "v_proj")
    },
}
NVFP4: dict[str, Any] = {"bits": 4, "group_size": 16, "number_format": "nvfp4"}
MXFP4: dict[str, Any] = {"bits": 4, "group_size": 32, "number_format": "mxfp4"}
FORMATS: dict[str, dict[str, Any]] = {
    "W4A4": {},
    "W4A8": {"quantized": InputFormat(bits=8, clip_ratio=1.0)},
    "W8A8": {"weight": WeightFormat(bits=8), "quantized": InputFormat(bits=8, clip_ratio=1.0)},
    "W2A3": {"weight": WeightFormat(bits=2), "quantized": InputFormat(bits=3, clip_ratio=0.8)},
    "zero points": {"weight": WeightFormat(bits=4, symmetric=False)},
    "zero points of inputs": {"quantized": InputFormat(bits=4, clip_ratio=0.9, symmetric=False)},
    "groups": {
        "weight": WeightFormat(bits=4, group_size=4, symmetric=False),
        "quantized": InputFormat(bits=4, clip_ratio=0.9, group_size=2),
    },
    "two levels": {
        "weight": WeightFormat(bits=4, group_size=4, sub_scale_bits=4),
        "quantized": InputFormat(bits=4, clip_ratio=0.9, group_size=4, sub_scale_bits=4),
    },
    "two levels of the weight": {
        **TWO_LEVELS,
        "quantized": InputFormat(bits=8, clip_ratio=1.0),
    },
    "NVFP4": {role: {"weight": NVFP4, "input": NVFP4 | {"clip_ratio": 1.0}} for role in ("q_proj", "k_proj", "v_proj")},
    "MXFP4": {role: {"weight": MXFP4, "input": MXFP4 | {"clip_ratio": 0.9}} for role in ("q_proj", "k_proj", "v_proj")},
    "8-bit outliers": {role: {"outlier": {"input_bits": 8}} for role in ROLES},
    "branches": BRANCHES,
    "branches, no outliers": {
        role: {"outliers_per_block": 0, "keep_width": False, **BRANCHES.get(role, {})} for role in ROLES
    },
    "branches, 8-bit outliers": {role: {"outlier": {"input_bits": 8}, **BRANCHES.get(role, {})} for role in ROLES},
    "branches, weight only": {"quantized": None, **BRANCHES},
    "8-bit outlier weights": {"quantized": None, **{role: {"outlier": {}} for role in ROLES}},
    "other bits in some blocks": {
        "overrides": [
            {"role": role, "layers": [1], "weight": {"bits": bits}, "input": {"bits": 8, "clip_ratio": 1.0}}
            for role, bits in (("q_proj", 8), ("k_proj", 8), ("v_proj", 8), ("down_proj", 2))
        ]
    },
    "weight only": {"weight": WeightFormat(bits=4, group_size=4, symmetric=False), "quantized": None},
    "input only": {"weight": None},
    "input only, groups": {"weight": None, "quantized": InputFormat(bits=4, clip_ratio=0.9, group_size=4)},
    "not quantized": {"weight": None, "quantized": None},
    "no outliers": {
        role: {"outliers_per_block": 0, "keep_width": False}
        for role in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    },
    "no transform": {"o_proj": {"hadamard": False}, "down_proj": {"hadamard": False, "keep_width": False}},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, load, toy_quad, write_toy, tolerance) -> None:
    folder = write_toy(toy_quad("llama", **FORMATS[name]))
    reference = AutoModelForCausalLM.from_pretrained(folder)
    found, wanted = outputs(load(folder, "float32"), reference, torch.float32)
    assert len(found) == 16  # 2 blocks, 4 layers, 2 numbers of tokens
    assert_alike(found, wanted, tolerance(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("base", ["llama", "mistral", "qwen2", "qwen3"])
def test_architectures(base, dtype, load, toy_quad, write_toy, tolerance) -> None:
    biased = base in ("llama", "qwen2")
    biases = {role: {"bias": biased} for role in ("q_proj", "k_proj", "v_proj")}
    biases["o_proj"] = {"bias": base == "llama"}
    folder = write_toy(toy_quad(base, **biases), dtype=dtype)
    served = load(folder)
    assert served.model.layers[0].self_attn.head_dim == 32
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert_alike(*outputs(served, reference, dtype), tolerance(dtype))


def test_branches_in_bfloat16(load, toy_quad, write_toy, tolerance) -> None:
    folder = write_toy(toy_quad("llama", **BRANCHES), dtype=torch.bfloat16)
    served, reference = load(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert_alike(*outputs(served, reference, torch.bfloat16), tolerance(torch.bfloat16))
    layer = served.model.layers[0].self_attn.qkv_proj
    assert (layer.branch_down.shape, layer.branch_up.shape) == ((9, 72), (256, 9))
    assert not hasattr(layer, "low_rank_branch")


def test_another_dtype_than_the_checkpoint_s(load, toy_quad, write_toy, tolerance) -> None:
    folder = write_toy(toy_quad("qwen2"), dtype=torch.bfloat16)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    found, wanted = outputs(load(folder, "float16"), reference, torch.float16)
    assert {y.dtype for y in found} == {torch.float16}
    assert_alike(found, wanted, tolerance(torch.float16))


def test_tied_embeddings(load, toy_quad, write_toy) -> None:
    served = load(write_toy(toy_quad("llama"), tie_word_embeddings=True))
    assert served.lm_head.weight.data_ptr() == served.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("packed", [False, True], ids=["floating point", "packed"])
@pytest.mark.parametrize("base", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_head_that_reads_the_embedding_s_table(base, packed, load, toy_quad, write_toy, tolerance) -> None:
    folder = write_toy(toy_quad(base, packed_ends=packed, shared_table=True), tie_word_embeddings=True)
    served, reference = load(folder, "float32"), AutoModelForCausalLM.from_pretrained(folder)
    x, residual = torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        wanted = reference.model.norm(x + residual)
        found, stream = served.model.norm(x.clone(), residual.clone())
        torch.testing.assert_close(found, wanted, **tolerance(torch.float32))
        torch.testing.assert_close(stream, x + residual)
        torch.testing.assert_close(served.model.norm(x + residual), wanted, **tolerance(torch.float32))
        torch.testing.assert_close(served.compute_logits(found), reference.lm_head(wanted), **tolerance(torch.float32))


@pytest.mark.parametrize("parts", ["plain", "centred", "centred and split", "balanced"])
def test_rounded_keys_and_values_are_left_to_vllm(parts, load, toy_quad, write_toy, tolerance, monkeypatch) -> None:
    log = Mock()
    monkeypatch.setattr("quad_modifiers.vllm_plugin.config.logger", log)
    centred, split = ("centred" in parts, "split" in parts)
    section = {"bits": 4, "clip_ratio": 0.9, "hadamard": True, "sink_tokens": 1, "centred": centred}
    if split:
        section["high"] = {"bits": 8, "key_rank": 2, "value_rank": 2, "value_basis": True}
    if parts == "balanced":
        section["key_inverse"] = True
    version = 7 if parts == "balanced" else 6 if split else 3
    quad = toy_quad("llama").model_copy(update={"format_version": version, "sections": {"kv_cache": section}})
    folder = write_toy(quad)
    stored = load_file(folder / "model.safetensors")
    assert ("model.layers.1.key_mean" in stored, "model.layers.1.value_basis" in stored) == (centred, split)
    assert ("model.layers.1.key_inverse" in stored) == (parts == "balanced")
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert_alike(*outputs(load(folder, "float32"), reference, torch.float32), tolerance(torch.float32))
    assert "--kv-cache-dtype int4_per_token_head" in log.warning_once.call_args.args[0]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_packed_embedding_and_head(tied, load, toy_quad, write_toy, tolerance) -> None:
    folder = write_toy(toy_quad("llama", packed_ends=True), tie_word_embeddings=tied, vocab_size=310)
    served, reference = load(folder, "float32"), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, 310, (9,), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        x = reference.model.embed_tokens(ids)
        torch.testing.assert_close(served.model.embed_tokens(ids), x, rtol=0, atol=0)
        torch.testing.assert_close(served.compute_logits(x), reference.lm_head(x), **tolerance(torch.float32))
    assert (served.lm_head.weight_packed is served.model.embed_tokens.weight_packed) == tied


def test_packed_weights_stay_small(load, toy_quad, write_toy) -> None:
    layer = load(write_toy(toy_quad("llama"), dtype=torch.bfloat16)).model.layers[0].mlp.gate_up_proj
    assert not hasattr(layer, "residual")
    assert layer.weight_packed.dtype in (torch.int8, torch.uint8)
    assert {name for name, _ in layer.named_parameters()} == {"weight_packed", "weight_scale", "outlier_weight"}


WEIGHT_ONLY = {
    "channels": WeightFormat(bits=4),
    "groups": WeightFormat(bits=4, group_size=4),
    "zero points": WeightFormat(bits=4, group_size=4, symmetric=False),
    "2 bits": WeightFormat(bits=2),
    "8 bits": WeightFormat(bits=8, group_size=4),
    "two levels": WeightFormat(bits=4, group_size=4, sub_scale_bits=4),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", WEIGHT_ONLY)
def test_weight_only_layers(name, dtype, load, toy_quad, write_toy, tolerance) -> None:
    folder = write_toy(toy_quad("llama", weight=WEIGHT_ONLY[name], quantized=None), dtype=dtype)
    served = load(folder, str(dtype).removeprefix("torch."))
    assert_alike(*outputs(served, AutoModelForCausalLM.from_pretrained(folder), dtype), tolerance(dtype))
    bits, fast = WEIGHT_ONLY[name].bits, 0
    for layer in served.model.layers:
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            held = dict(linear.named_parameters())
            width, is_fast = linear.quant_method.split.residual_width, linear.quant_method.instructions is not None
            # Without vLLM's product, rows of 4 bits are filled up to whole chunks of 128 inputs.
            per_row = width if bits == 8 else width // 2 if is_fast else -(-width // 128) * 64
            assert held["weight_packed"].nbytes == linear.output_size * per_row
            assert ("weight_zero_point" in held) == (name == "zero points")
            fast += is_fast
    # 64 inputs and 256 outputs of q, k and v; the others have 72 and 200
    is_taken = bits == 4 and dtype != torch.float32 and name != "two levels" and weight_only.is_available()
    assert fast == (2 if is_taken else 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(
            lambda t: t.pop("model.layers.1.mlp.down_proj.residual.weight_scale"),
            r"layers\.1\.mlp\.down_proj\.residual\.weight_scale is missing",
            id="missing",
        ),
        pytest.param(
            lambda t: t.update({"model.layers.0.self_attn.v_proj.outlier.weight": torch.zeros(8, 64)}),
            r"layers\.0\.self_attn\.v_proj\.outlier\.weight has shape \[8, 64\], needed is \[64, 8\]",
            id="transposed",
        ),
        pytest.param(
            lambda t: t.update({"model.layers.0.mlp.extra": torch.zeros(2)}),
            "extra is not part of the model",
            id="surplus",
        ),
        pytest.param(
            lambda t: t["model.layers.0.self_attn.k_proj.residual.weight_scale"].fill_(float("nan")),
            r"k_proj\.residual\.weight_scale holds NaN",
            id="NaN",
        ),
    ],
)
def test_damaged_checkpoints_are_refused(damage, message, load, toy_quad, write_toy) -> None:
    folder = write_toy(toy_quad("llama"))
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_cut_file_is_refused(load, toy_quad, write_toy) -> None:
    file = write_toy(toy_quad("llama")) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"safetensors"):
        load(file.parent)


def test_members_that_differ_are_refused(load, toy_quad, write_toy) -> None:
    folder = write_toy(toy_quad("llama", k_proj={"weight": WeightFormat(bits=8)}))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.qkv_proj: .* weight is .* for k_proj"):
        load(folder)


def test_terms_and_sections_of_plugins_are_refused(toy_quad) -> None:
    from quad_modifiers.vllm_plugin.config import QuadConfig

    own = toy_quad(o_proj={"terms": {"low_rank_branch": {"rank": 2}, "somebodys": {}}}).section()
    own["sections"] = {"low_rank_branch": {}}
    with pytest.raises(ValueError, match=r"the checkpoint has 'low_rank_branch', 'somebodys', which the vLLM plugin"):
        QuadConfig.from_config({"quad": own})
    del own["sections"]
    with pytest.raises(ValueError, match=r"the checkpoint has 'somebodys', which the vLLM plugin does not compute"):
        QuadConfig.from_config({"quad": own})


Build = Callable[[str, int, int], Any]


@pytest.fixture
def build(load, toy_quad, write_toy, monkeypatch: pytest.MonkeyPatch) -> Callable[[QuadFormat], Build]:
    """`build(quad)(name, rank, ranks)`: one layer of the first block as that rank holds it."""
    import vllm.model_executor.layers.linear as vllm_linear
    from vllm.config import VllmConfig, set_current_vllm_config

    from quad_modifiers.vllm_plugin.config import QuadConfig

    classes: dict[str, Callable[..., Any]] = {
        "qkv_proj": lambda **given: vllm_linear.QKVParallelLinear(72, 32, 4, 2, **given),
        "gate_up_proj": lambda **given: vllm_linear.MergedColumnParallelLinear(72, [100, 100], **given),
        "o_proj": lambda **given: vllm_linear.RowParallelLinear(128, 72, **given),
        "down_proj": lambda **given: vllm_linear.RowParallelLinear(100, 72, **given),
    }
    members = {"qkv_proj": ("q", "k", "v"), "gate_up_proj": (0, 1)}

    def of(quad: QuadFormat) -> Build:
        folder = write_toy(quad)
        tensors = load_file(folder / "model.safetensors")
        load(folder)  # starts the distributed environment

        def make(name: str, rank: int, ranks: int) -> Any:
            monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(vllm_linear, "get_tensor_model_parallel_world_size", lambda: ranks)
            config = QuadConfig(quad)
            config.packed_modules_mapping = {
                "qkv_proj": ["q_proj", "k_proj", "v_proj"],
                "gate_up_proj": ["gate_proj", "up_proj"],
            }
            roles = config.packed_modules_mapping.get(name, [name])
            parent = "mlp" if name in ("gate_up_proj", "down_proj") else "self_attn"
            with set_current_vllm_config(VllmConfig()):
                layer = classes[name](
                    bias=quad.linears[roles[0]].bias, quant_config=config, prefix=f"model.layers.0.{parent}.{name}"
                )
            for role, shard in zip(roles, members.get(name, (None,)), strict=True):
                start = f"model.layers.0.{parent}.{role}."
                for key in [key for key in tensors if key.startswith(start) and not key.endswith("weight_shape")]:
                    parameter = layer.get_parameter(key.removeprefix(start))
                    parameter.weight_loader(parameter, tensors[key], *(() if shard is None else (shard,)))
            layer.quant_method.process_weights_after_loading(layer)
            return layer

        return make

    return of


SHARDED = {
    "W4A4, biases": {role: {"bias": True} for role in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "groups": FORMATS["groups"],
    "weight only": FORMATS["weight only"],
    "8-bit outliers": FORMATS["8-bit outliers"],
    "branches": FORMATS["branches"],
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SHARDED)
def test_row_parallel_ranks_add_up_to_the_whole_layer(name, ranks, build, toy_quad, monkeypatch) -> None:
    from quad_modifiers.vllm_plugin import linear

    make = build(toy_quad("llama", **SHARDED[name]))
    for layer in ("o_proj", "down_proj"):
        whole = make(layer, 0, 1)
        x = torch.randn(5, whole.input_size, generator=torch.Generator().manual_seed(1))
        # What vLLM's collective returns: the inputs of all ranks side by side.
        monkeypatch.setattr(linear, "tensor_model_parallel_all_gather", lambda part, x=x: x)
        outputs = []
        for rank, part in enumerate(x.chunk(ranks, dim=-1)):
            shard = make(layer, rank, ranks)
            bias = shard.bias if rank == 0 else None  # as RowParallelLinear.forward passes it
            outputs.append(shard.quant_method.apply(shard, part, bias))
            everything = dict(whole.named_parameters())
            for key, own in shard.named_parameters():
                if key in ("weight_packed", "outlier_packed") and own.dim() == 3:  # in blocks of 16 channels
                    assert own.shape[1:] == everything[key].shape[1:]
                    assert len(own) == -(-(whole.output_size // ranks) // 16)
                elif key == "branch_down":
                    assert torch.equal(own, everything[key])
                elif key != "bias":
                    assert own.numel() * ranks == everything[key].numel()
        torch.testing.assert_close(sum(outputs), whole(x)[0])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", SHARDED)
def test_column_parallel_ranks_hold_the_rows_of_the_whole_layer(name, ranks, build, toy_quad) -> None:
    make = build(toy_quad("llama", **SHARDED[name]))
    for layer, sizes in (("qkv_proj", (128, 64, 64)), ("gate_up_proj", (100, 100))):
        whole = make(layer, 0, 1)
        x = torch.randn(5, 72, generator=torch.Generator().manual_seed(2))
        wanted = whole(x)[0].split(sizes, dim=-1)
        for rank in range(ranks):
            shard = make(layer, rank, ranks)
            found = shard(x)[0].split(shard.output_partition_sizes, dim=-1)
            for part, full in zip(found, wanted, strict=True):
                replicas = part.shape[-1] * ranks // full.shape[-1]  # key and value heads, if there are too few
                start = rank // replicas * part.shape[-1]
                torch.testing.assert_close(part, full[:, start : start + part.shape[-1]])
