"""DynamicActQuant."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import InputQuantization, fake_quantize, split_input

from quad_modifiers.nn.quad_linear import QuadLinear

pytest.importorskip("llmcompressor")
from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection
from quad_modifiers.passes.clip_ratios import CANDIDATES


def settings_by_role(model) -> dict[str, InputQuantization | None]:
    modules = [module for module in model.modules() if isinstance(module, QuadLinear)]
    assert modules
    return {module.role: module.input_quantization if module.quantize_input else None for module in modules}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"u_type_bits": 1}, "u_type_bits"),
        ({"d_type_bits": 9}, "d_type_bits"),
        ({"u_type_clip_ratio": 0.0}, "u_type_clip_ratio"),
        ({"d_type_clip_ratio": 1.1}, "d_type_clip_ratio"),
        ({"d_type_clip_ratio": "best"}, "d_type_clip_ratio"),
        ({"strategy": "group"}, "group_size .* goes with strategy 'group'"),
        ({"group_size": 32}, "group_size .32. goes with strategy 'group'"),
        ({"strategy": "group", "group_size": 4}, "group_size"),
        ({"strategy": "tensor"}, "strategy"),
        ({"bits": 4}, "bits"),
        (
            {"symmetric": False, "d_type_bits": 8},
            "inputs of 8 bits less their zero points do not fit into 8 bits; use 7",
        ),
        ({"symmetric": False, "overrides": [{"layers": 0, "bits": 8}]}, "inputs of 8 bits less their zero points"),
        (
            {"symmetric": False, "strategy": "group", "group_size": 32, "sub_scale_bits": 4},
            "sub_scale_bits goes with symmetric integers",
        ),
        ({"number_format": "fp6"}, "number_format"),
        ({"number_format": "nvfp4", "d_type_bits": 8}, "numbers of nvfp4 have 4 bits, not 8"),
        ({"number_format": "mxfp4", "overrides": [{"layers": 0, "bits": 8}]}, "numbers of mxfp4 have 4 bits, not 8"),
        ({"number_format": "nvfp4", "strategy": "group", "group_size": 16}, "has groups of its own; leave strategy"),
        ({"number_format": "nvfp4", "o_proj_scale": "head"}, "o_proj_scale .* without sub_scale_bits .* nvfp4"),
        ({"four_over_six": True}, "four_over_six is for number_format nvfp4, not int"),
        ({"number_format": "nvfp4", "symmetric": False}, "has neither sub_scale_bits nor zero points"),
    ],
)
def test_fields_are_validated(fields, match) -> None:
    with pytest.raises(ValueError, match=match):
        DynamicActQuant(**fields)


def test_bits_and_clip_ratio_per_role(make_toy, compress) -> None:
    modifier = DynamicActQuant(u_type_bits=4, d_type_bits=8, u_type_clip_ratio=0.9, d_type_clip_ratio=1.0)
    found = settings_by_role(compress(make_toy(), modifier))
    for role in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert found[role] == InputQuantization(4, 0.9)
    for role in ("o_proj", "down_proj"):
        assert found[role] == InputQuantization(8, 1.0)


def test_zero_points_of_the_part_of_4_bits(make_toy, compress) -> None:
    projection = SVDOutlierProjection(rank=8, basis="square", o_proj_rank_per_head=2)
    quantizer = DynamicActQuant(symmetric=False, outlier_bits=8, o_proj_scale="head", d_type_clip_ratio=1.0)
    model = compress(make_toy(), projection, quantizer, OutlierSplitGPTQ(outlier_bits=8))
    found = settings_by_role(model)
    assert found["q_proj"] == InputQuantization(4, 0.92, symmetric=False)
    assert found["down_proj"] == InputQuantization(4, 1.0, symmetric=False)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    assert found["o_proj"] == InputQuantization(4, 1.0, head_dim, symmetric=False)
    outliers = {m.outlier_quantization for m in model.modules() if isinstance(m, QuadLinear)}
    assert outliers == {InputQuantization(8)}


def test_the_chosen_ratio_has_the_least_error(make_toy, compress, token_ids) -> None:
    """Measured on the inputs of a layer that is projected and not quantized, of the tokens that calibrate."""
    plain = compress(make_toy(num_hidden_layers=1), SVDOutlierProjection(rank=8))
    automatic = DynamicActQuant(u_type_clip_ratio="auto", d_type_clip_ratio="auto")
    found = settings_by_role(compress(make_toy(num_hidden_layers=1), SVDOutlierProjection(rank=8), automatic))
    inputs: dict[str, torch.Tensor] = {}
    linears = {module.role: module for module in plain.modules() if isinstance(module, QuadLinear)}
    groups = {"q_proj": ("q_proj", "k_proj", "v_proj"), "down_proj": ("down_proj",)}
    for role in groups:
        linears[role].register_forward_pre_hook(lambda _, args, role=role: inputs.update({role: args[0]}))
    with torch.no_grad():
        plain(token_ids())
    for role, members in groups.items():
        _, residual = split_input(inputs[role].flatten(0, 1).float(), linears[role].split)
        weight = torch.cat([linears[member].residual.weight for member in members])
        errors = {
            ratio: float(((fake_quantize(residual, InputQuantization(4, ratio)) - residual) @ weight.T).square().sum())
            for ratio in CANDIDATES
        }
        least = min(errors.values())
        print(role, found[role].clip_ratio, errors[found[role].clip_ratio] / least)
        assert errors[found[role].clip_ratio] <= 1.001 * least  # neighbours may be alike
        assert errors[1.0] > 1.05 * least


def test_who_gets_a_ratio_of_its_own(make_toy, compress) -> None:
    projection = SVDOutlierProjection(rank=8)
    automatic = DynamicActQuant(u_type_clip_ratio="auto", d_type_clip_ratio="auto")
    found = settings_by_role(compress(make_toy(), projection, automatic))
    assert {setting.bits for setting in found.values()} == {4}
    assert found["q_proj"] == found["k_proj"] == found["v_proj"]
    assert found["gate_proj"] == found["up_proj"]
    assert all(setting.clip_ratio in CANDIDATES and setting.clip_ratio < 1 for setting in found.values())
    fixed = settings_by_role(compress(make_toy(), projection, DynamicActQuant(d_type_clip_ratio="auto")))
    assert fixed["q_proj"].clip_ratio == 0.92
    assert fixed["down_proj"] == found["down_proj"]


def test_what_stands_out_is_clipped_more(make_toy, compress) -> None:
    model = make_toy(num_hidden_layers=1)
    model.model.layers[0].mlp.down_proj.weight.data[:, :8] = 0  # large channels that nobody reads
    model.model.layers[0].mlp.up_proj.weight.data[:8] *= 20
    automatic = DynamicActQuant(u_type_clip_ratio="auto", d_type_clip_ratio="auto")
    found = settings_by_role(compress(model, automatic))
    assert found["down_proj"].clip_ratio == min(CANDIDATES)
    assert found["o_proj"].clip_ratio > 0.6


def test_none_leaves_a_role_alone(make_toy, compress) -> None:
    found = settings_by_role(compress(make_toy(), DynamicActQuant(u_type_bits=None, d_type_bits=8)))
    assert found["q_proj"] is None
    assert found["down_proj"] is not None


@pytest.mark.parametrize("strategy", [{}, {"strategy": "group", "group_size": 16}], ids=["token", "group"])
def test_more_bits_are_closer(strategy, make_toy, compress, logits_of) -> None:
    wanted = logits_of(make_toy())
    errors = []
    for bits in (2, 4, 6, 8):
        fields = {"u_type_bits": bits, "d_type_bits": bits, "u_type_clip_ratio": 1.0, "d_type_clip_ratio": 1.0}
        model = compress(make_toy(), DynamicActQuant(**fields, **strategy))
        errors.append(float((logits_of(model) - wanted).norm() / wanted.norm()))
    print(errors)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05
    assert errors[0] > 0.1


def test_the_projection_helps_activation_quantization(make_toy, compress, logits_of) -> None:
    """The toys' embeddings have three directions of large energy: what the method is for."""
    wanted = logits_of(make_toy())
    quantizer = {"u_type_bits": 4, "d_type_bits": 8}
    errors = {}
    for name, modifiers in {
        "plain": [],
        "rank 0": [SVDOutlierProjection(rank=0)],
        "rank 8": [SVDOutlierProjection(rank=8)],
    }.items():
        model = compress(make_toy(), *modifiers, DynamicActQuant(**quantizer))
        errors[name] = float((logits_of(model) - wanted).norm() / wanted.norm())
    print(errors)
    assert errors["rank 8"] < 0.8 * errors["rank 0"]
    assert errors["rank 8"] < 0.8 * errors["plain"]


def test_group_size_is_checked_against_the_projected_width(make_toy, compress) -> None:
    """64 + 8 - 8 residual coordinates fit groups of 16; 64 - 8 in the square basis do not."""
    quantizer = {"strategy": "group", "group_size": 16}
    model = compress(make_toy(), SVDOutlierProjection(rank=8), DynamicActQuant(**quantizer))
    assert settings_by_role(model)["q_proj"].group_size == 16
    with pytest.raises(ValueError, match=r"group_size \(16\) must divide the residual width \(56\) of .*q_proj"):
        compress(make_toy(), SVDOutlierProjection(rank=8, basis="square"), DynamicActQuant(**quantizer))


def test_calibration_of_the_projection_sees_unquantized_inputs(make_toy, compress) -> None:
    """Quantization switches on in its own turn: the projection before it must not depend on it."""
    alone = compress(make_toy(), SVDOutlierProjection(rank=8))
    both = compress(make_toy(), SVDOutlierProjection(rank=8), DynamicActQuant(u_type_bits=2, d_type_bits=2))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(both.state_dict()[name], tensor), name
