"""The geometry of ResQ (arXiv 2412.14363) as settings of the projection and of the inputs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from quad_kernels import InputQuantization

from quad_modifiers.nn.quad_linear import QuadLinear

pytest.importorskip("llmcompressor")
from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection
from quad_modifiers.recipe import RecipeError, check_recipe
from quad_modifiers.recipe.overrides import overridden

RESQ: dict[str, Any] = {
    "rank": "1/8",
    "basis": "square",
    "rotation": "random",
    "online_rotation": ["down_proj"],
    "o_proj_rank_per_head": "1/8",
    "values_basis": "values",
}
HEAD_DIM = 16


def containers(model: Any) -> dict[str, QuadLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuadLinear)}


def seen(model: Any, name: str, ids: torch.Tensor, output: bool) -> torch.Tensor:
    """What goes into a module, or comes out of it, `[tokens, width]`, float64."""
    found: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(
        lambda module, args, result: found.append(result if output else args[0])
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    return found[0].double().flatten(0, 1)


def moments(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Second moment of the vectors of each key-value head, `[heads, head_dim, head_dim]`."""
    vectors = x.unflatten(-1, (heads, -1, HEAD_DIM)).transpose(0, 1).flatten(1, 2)
    return vectors.transpose(1, 2) @ vectors / vectors.shape[1]


@pytest.mark.parametrize("size", ["even", "odd"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3", "mistral"])
def test_the_model_computes_the_same_before_it_is_quantized(
    model_type, size, make_toy, compress, logits_of, assert_same_function
) -> None:
    wanted = logits_of(make_toy(model_type, size))
    model = compress(make_toy(model_type, size), SVDOutlierProjection(**RESQ))
    assert_same_function(logits_of(model), wanted)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for module in containers(model).values():
        if module.role == "down_proj":
            assert (module.split.rank, module.split.hadamard) == (0, True)
        elif module.role == "o_proj":
            assert (module.split.outliers, module.split.block, module.split.hadamard) == (
                head_dim // 8,
                head_dim,
                False,
            )
        else:
            assert module.split.rank == config.hidden_size // 8
            assert module.split.residual_width == config.hidden_size - config.hidden_size // 8


@pytest.mark.parametrize("values_basis", ["values", "attention"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
def test_outliers_of_a_head_hold_the_energy_of_its_first_directions(
    model_type, values_basis, make_toy, compress, token_ids
) -> None:
    """Of v_proj's outputs or of o_proj's inputs, on the tokens that calibrate, in the first block."""
    original, ids, kept = make_toy(model_type), token_ids(), 3
    heads = original.config.num_key_value_heads
    maker = "qkv_proj" if model_type == "phi3" else "v_proj"

    def wanted_and_other(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        made = seen(model, f"model.layers.0.self_attn.{maker}", ids, output=True)[:, -heads * HEAD_DIM :]
        read = seen(model, "model.layers.0.self_attn.o_proj", ids, output=False)
        both = moments(made, heads), moments(read, heads)
        return both if values_basis == "values" else both[::-1]

    gram, other = wanted_and_other(original)
    best = torch.linalg.eigvalsh(gram)[:, -kept:].sum(-1)
    best_of_other = torch.linalg.eigvalsh(other)[:, -kept:].sum(-1)
    fields = RESQ | {"o_proj_rank_per_head": kept, "values_basis": values_basis}
    gram, other = wanted_and_other(compress(make_toy(model_type), SVDOutlierProjection(**fields)))
    first = gram[:, :kept, :kept]
    torch.testing.assert_close(first.diagonal(dim1=1, dim2=2).sum(-1), best, rtol=1e-3, atol=0)
    # The other one is not what the basis was made for.
    assert bool((other[:, :kept, :kept].diagonal(dim1=1, dim2=2).sum(-1) < 0.999 * best_of_other).any())
    # Rotated among each other: no eigenvectors any more.
    off = first - torch.diag_embed(first.diagonal(dim1=1, dim2=2))
    assert float(off.abs().amax() / first.abs().amax()) > 0.05


def test_other_rotations_leave_the_outliers_of_a_head_eigenvectors(make_toy, compress, token_ids) -> None:
    model = compress(make_toy(), SVDOutlierProjection(**RESQ | {"o_proj_rank_per_head": 3, "rotation": "hadamard"}))
    first = moments(seen(model, "model.layers.0.self_attn.v_proj", token_ids(), output=True), 2)[:, :3, :3]
    off = first - torch.diag_embed(first.diagonal(dim1=1, dim2=2))
    assert float(off.abs().amax() / first.abs().amax()) < 1e-3


def test_one_scale_per_token_and_head(make_toy, compress, tmp_path) -> None:
    inputs = DynamicActQuant(o_proj_scale="head", d_type_clip_ratio=0.9)
    model = compress(make_toy(), SVDOutlierProjection(**RESQ), inputs, OutlierSplitGPTQ(), output_dir=tmp_path / "out")
    found = {module.role: module.input_quantization for module in containers(model).values()}
    assert found["o_proj"] == InputQuantization(4, 0.9, HEAD_DIM)
    assert found["down_proj"] == InputQuantization(4, 0.9)
    assert found["q_proj"] == InputQuantization(4, 0.92)
    linears = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quad"]["linears"]
    assert linears["o_proj"]["input"]["group_size"] == HEAD_DIM
    assert linears["down_proj"]["input"]["group_size"] is None


def test_a_scale_per_token_beside_groups(make_toy, compress) -> None:
    model = compress(make_toy(), DynamicActQuant(strategy="group", group_size=8, o_proj_scale="token"))
    found = {module.role: module.input_quantization for module in containers(model).values()}
    assert (found["o_proj"].group_size, found["down_proj"].group_size) == (None, 8)


@pytest.mark.parametrize(
    "fields",
    [
        {"o_proj_scale": "head", "d_type_bits": None},
        {"o_proj_scale": "head", "strategy": "group", "group_size": 8, "sub_scale_bits": 4},
        {"o_proj_scale": "channel"},
    ],
)
def test_scales_that_cannot_be(fields) -> None:
    with pytest.raises(ValueError, match="o_proj_scale"):
        DynamicActQuant(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": "1/65"}, r"rank \(1/65\) of hidden_size \(64\) is no coordinate at all"),
        ({"rank": "1/1"}, r"rank \(1/1\) must be smaller than hidden_size \(64\)"),
        ({"o_proj_rank_per_head": "1/17"}, r"o_proj_rank_per_head \(1/17\) of head_dim \(16\) is no coordinate at all"),
        ({"down_proj_rank": "1/129"}, r"down_proj_rank \(1/129\) of intermediate_size \(128\) is no coordinate"),
    ],
)
def test_shares_that_leave_nothing(fields, message, make_toy, compress) -> None:
    model = make_toy()
    with pytest.raises(ValueError, match=message):
        compress(model, SVDOutlierProjection(**RESQ | fields))
    assert not containers(model), "refused before it was touched"


@pytest.mark.parametrize("value", ["1/0", "3/8", "an eighth", "-1", "0.125", "2.5"])
def test_bad_shares_are_found_without_a_model(value) -> None:
    with pytest.raises(
        RecipeError, match=r"SVDOutlierProjection\.rank: a number, or a share such as 1/8: Input should .*, not"
    ):
        overridden("resq_w4a4", [f"SVDOutlierProjection.rank={value}"])


def test_shares_by_override() -> None:
    text = overridden("resq_w4a4", ["SVDOutlierProjection.rank=1/16", "SVDOutlierProjection.o_proj_rank_per_head=2"])
    assert check_recipe(text) == []
    assert "rank: 1/16" in text
    assert SVDOutlierProjection(rank="64").rank == 64
    assert SVDOutlierProjection(rank="1/16").residual_width("stream", 64) == 64, "extended"
    assert SVDOutlierProjection(rank="1/16", basis="square").residual_width("stream", 64) == 60
