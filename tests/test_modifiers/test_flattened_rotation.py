"""FlattenedRotation turns what a projection left, and changes nothing else."""

from __future__ import annotations

import logging
import re
from statistics import fmean

import pytest
import torch
from quad_kernels import split_input

from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.tools.inspection.measure.inputs import measure_inputs

pytest.importorskip("llmcompressor")
from transformers import AutoModelForCausalLM

from quad_modifiers.modifiers.base import prepared_decoder
from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
from quad_modifiers.modifiers.flattened_rotation import FlattenedRotation
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection

RANKS = {"even": 8, "mha": 0, "odd": 12, "odder": 7}


@pytest.mark.parametrize("basis", ["extended", "square"])
@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "granite"])
def test_the_function_stays(model_type, size, basis, make_toy, compress, logits_of, assert_same_function) -> None:
    tied = (len(model_type) + list(RANKS).index(size)) % 2 == (basis == "square")
    model = make_toy(model_type, size, tie_word_embeddings=tied)
    wanted = logits_of(model)
    projection = SVDOutlierProjection(
        rank=RANKS[size], basis=basis, o_proj_rank_per_head=len(size) - 3, down_proj_rank=4
    )
    compress(model, projection, FlattenedRotation(rounds=6, refinement_rounds=2, tokens=400))
    assert_same_function(logits_of(model), wanted)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("keep", [False, True])
def test_both_ends(keep, make_toy, compress, logits_of, assert_same_function) -> None:
    model = make_toy("qwen3", "odd", tie_word_embeddings=True)
    model.model.norm.weight.data = torch.linspace(-2, 3, 84)  # what the two ends do not share
    wanted = logits_of(model)
    compress(model, SVDOutlierProjection(rank=6, keep_tied=keep), FlattenedRotation(rounds=4, tokens=400))
    assert hasattr(model.model.norm, "head_transform") == keep
    assert_same_function(logits_of(model), wanted)


@pytest.mark.parametrize("online", [[], ["o_proj", "down_proj"]], ids="+".join)
def test_biases_and_online_transforms(online, make_toy, compress, logits_of, assert_same_function) -> None:
    model = make_toy("llama", "even", attention_bias=True, mlp_bias=True)
    wanted = logits_of(model)
    projection = SVDOutlierProjection(rank=8, online_rotation=online, o_proj_rank_per_head=2, down_proj_rank=4)
    compress(model, projection, FlattenedRotation(rounds=4, tokens=400))
    assert_same_function(logits_of(model), wanted)


def test_only_residual_coordinates_move(make_toy, compress) -> None:
    models = []
    for extra in ([], [FlattenedRotation(rounds=6, tokens=400, values=False)]):
        model = make_toy("llama", "even")
        models.append(compress(model, SVDOutlierProjection(rank=8, o_proj_rank_per_head=2), *extra))
    before, after = models
    old, new = before.model.embed_tokens.weight, after.model.embed_tokens.weight
    assert torch.equal(old[:, :8], new[:, :8])
    assert float((old - new).norm() / old.norm()) > 0.05
    torch.testing.assert_close(old.norm(dim=1), new.norm(dim=1))
    for name in ("q_proj", "v_proj"):
        pair = [getattr(model.model.layers[0].self_attn, name) for model in models]
        assert torch.equal(pair[0].outlier.weight, pair[1].outlier.weight)
        assert not torch.equal(pair[0].residual.weight, pair[1].residual.weight)
        # Orthogonal to 1e-6: all products of rows are what they were.
        products = [linear.residual.weight.double() @ linear.residual.weight.double().T for linear in pair]
        assert float((products[0] - products[1]).abs().max() / products[0].abs().max()) < 1e-6


def test_values_turn_alone(make_toy, compress) -> None:
    model = compress(
        make_toy("llama", "even"),
        SVDOutlierProjection(rank=8, o_proj_rank_per_head=2, online_rotation=["down_proj"]),
        FlattenedRotation(rounds=8, tokens=400),
    )
    reference = compress(
        make_toy("llama", "even"),
        SVDOutlierProjection(rank=8, o_proj_rank_per_head=2, online_rotation=["down_proj"]),
        FlattenedRotation(rounds=8, tokens=400, values=False),
    )
    for turned, plain in zip(model.model.layers, reference.model.layers, strict=True):
        ours, theirs = (layer.self_attn.v_proj.residual.weight.unflatten(0, (2, 16)) for layer in (turned, plain))
        assert torch.equal(ours[:, :2], theirs[:, :2]), "outlier coordinates of the heads"
        assert not torch.allclose(ours[:, 2:], theirs[:, 2:], rtol=1e-2)
        assert torch.equal(turned.self_attn.q_proj.residual.weight, plain.self_attn.q_proj.residual.weight)


def heavy_tailed(model):
    """A toy whose stream is made of heavy-tailed sources: there is a flatter basis than a random one."""
    generator = torch.Generator().manual_seed(3)
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator).sign() * 4)
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1)
            layer.post_attention_layernorm.weight.fill_(1)
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
    return model


def ratio(model, windows) -> float:
    """GSR of the inputs that read the stream, mean over the blocks."""
    rows = measure_inputs(Decoder(model, Architecture("llama")), windows, "after")
    return fmean(row.step_to_std for row in rows if row.group in ("qkv", "gate_up"))


def test_the_grid_is_finer_than_with_a_random_hadamard(make_toy, compress, token_ids) -> None:
    found = []
    windows = list(token_ids(4, 48, seed=77).split(1))  # that nothing is calibrated with
    for extra in ([], [FlattenedRotation(rounds=40, tokens=2000, end=1.4)]):
        model = heavy_tailed(make_toy("llama", "even"))
        projection = SVDOutlierProjection(rank=0, basis="square", online_rotation=["down_proj"])
        model = compress(model, projection, *extra, dataset=token_ids(16, 64), num_calibration_samples=16)
        found.append(ratio(model, windows))
    print(f"GSR {found[0]:.3f} of a random Hadamard, {found[1]:.3f} flattened")
    assert found[1] < 0.9 * found[0]


def test_what_is_logged(make_toy, compress, caplog) -> None:
    with caplog.at_level(logging.INFO):
        compress(
            make_toy("llama", "even"),
            SVDOutlierProjection(rank=8),
            FlattenedRotation(rounds=3, refinement_rounds=3, tokens=400),
            DynamicActQuant(),
        )
    assert "stream largest magnitude / RMS" in caplog.text
    assert "rounding error / energy" in caplog.text
    assert "FlattenedRotation: values" in caplog.text


def test_same_seed_same_model(make_toy, compress) -> None:
    states = []
    for index, seed in enumerate((1, 1, 2)):
        torch.manual_seed(index)  # the global generator must not matter
        model = make_toy("llama", "odd", num_hidden_layers=1)
        turned = FlattenedRotation(rounds=3, tokens=60, seed=seed)
        states.append(compress(model, SVDOutlierProjection(rank=4), turned).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    name = "model.layers.0.self_attn.q_proj.residual.weight"
    assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_of_it(dtype, make_toy, compress, logits_of, tmp_path) -> None:
    model = compress(
        make_toy("llama", "even", dtype=dtype),
        SVDOutlierProjection(rank=8, o_proj_rank_per_head=2, down_proj_rank=4),
        FlattenedRotation(rounds=4, tokens=400),
        DynamicActQuant(),
        OutlierSplitGPTQ(sweeps=1),
        output_dir=tmp_path / "out",
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize(
    ("modifiers", "message"),
    [
        ((FlattenedRotation(),), "the recipe has none; put SVDOutlierProjection before it"),
        ((FlattenedRotation(), SVDOutlierProjection()), "SVDOutlierProjection comes after FlattenedRotation"),
        ((SVDOutlierProjection(), FlattenedRotation(), FlattenedRotation()), "another FlattenedRotation; keep one"),
        (
            (SVDOutlierProjection(), OutlierSplitGPTQ(), FlattenedRotation()),
            "FlattenedRotation comes after OutlierSplitGPTQ, but it would rotate weights that are quantized already",
        ),
        (
            (SVDOutlierProjection(), DynamicActQuant(), FlattenedRotation()),
            "FlattenedRotation comes after DynamicActQuant, but it changes the inputs",
        ),
        ((SVDOutlierProjection(), FlattenedRotation(rounds=0)), "rounds and refinement_rounds are both 0"),
    ],
    ids=["alone", "before", "two", "quantized", "inputs", "nothing"],
)
def test_refused_before_anything_is_touched(modifiers, message, refusal_of) -> None:
    assert re.search(message, refusal_of(modifiers))


def test_a_model_that_was_not_projected_is_refused(make_toy, token_ids) -> None:
    model = make_toy("llama", "even")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="a norm of the model has weights that are not 1; put SVDOutlierProjection"):
        FlattenedRotation().run(prepared_decoder(model), lambda: [{"input_ids": token_ids(2, 16)}])
    assert all(
        torch.equal(model.state_dict()[name.replace("_proj.", "_proj.residual.")], state[name]) for name in state
    )


def test_values_of_zeros_stay(make_toy, compress, logits_of, assert_same_function) -> None:
    """As in a block that was put in: its attention adds nothing."""
    model = make_toy("llama", "even")
    model.model.layers[1].self_attn.v_proj.weight.data.zero_()
    wanted = logits_of(model)
    compress(model, SVDOutlierProjection(rank=4), FlattenedRotation(rounds=2, tokens=100))
    assert_same_function(logits_of(model), wanted)


@pytest.mark.parametrize("field", [{"rounds": -1}, {"end": 0.0}, {"start_percentile": 0}, {"tokens": 0}, {"rank": 3}])
def test_settings_out_of_range(field) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        FlattenedRotation(**field)


def test_one_batch_is_warned_about(make_toy, compress, token_ids, caplog) -> None:
    compress(
        make_toy("llama", "even", num_hidden_layers=1),
        SVDOutlierProjection(rank=4),
        FlattenedRotation(rounds=2, tokens=40),
        dataset=token_ids(1, 48),
        num_calibration_samples=1,
    )
    assert "one calibration batch" in caplog.text


def test_input_of_o_proj_keeps_its_outliers(make_toy, compress, token_ids) -> None:
    """Where the online Hadamard follows, the split of the turned input is that of the input before, turned."""
    model = compress(
        make_toy("llama", "even", num_hidden_layers=1),
        SVDOutlierProjection(rank=4, o_proj_rank_per_head=2),
        FlattenedRotation(rounds=2, tokens=40),
    )
    seen = []
    linear = model.model.layers[0].self_attn.o_proj
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(token_ids(1, 20))
    hook.remove()
    outlier, residual = split_input(seen[0].flatten(0, 1), linear.split)
    y = residual @ linear.residual.weight.T + outlier @ linear.outlier.weight.T
    torch.testing.assert_close(y, linear(seen[0]).flatten(0, 1), rtol=1e-4, atol=1e-4)
