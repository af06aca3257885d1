"""OutlierLoRA: compressing and tuning in one recipe."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("llmcompressor")
pytest.importorskip("peft")

from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
from quad_modifiers.modifiers.embedding_head_quant import EmbeddingHeadQuant
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.recipe import validate_modifiers
from quad_peft.modifier import OutlierLoRA


def before_tuning() -> list:
    return [
        SVDOutlierProjection(rank=8, o_proj_rank_per_head=2, down_proj_rank=4),
        DynamicActQuant(u_type_bits=4, d_type_bits=8),
        OutlierSplitGPTQ(bits=2),
    ]


def divergence(model, original, ids) -> float:
    with torch.no_grad():
        ours, theirs = (m(ids).logits.float().log_softmax(-1) for m in (model, original))
    return float(torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True) / ids.numel())


def residuals(model) -> dict[str, torch.Tensor]:
    return {
        name: module.packed().quantized_weight().integers
        for name, module in model.named_modules()
        if isinstance(module, QuadLinear)
    }


@pytest.fixture(scope="module")
def untuned(make_toy, compress):
    return compress(make_toy(), *before_tuning())


@pytest.fixture(scope="module")
def tuned(make_toy, compress, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "out"
    # The best state is chosen on more than one window: chance decides between states on a single one.
    tuning = OutlierLoRA(epochs=16, learning_rate=2e-4, batch_size=2, validation=0.3)
    return compress(make_toy(), *before_tuning(), tuning, output_dir=folder), folder


def test_tuning_brings_the_model_closer_to_the_original(tuned, untuned, make_toy, token_ids) -> None:
    original, ids = make_toy(), token_ids()
    before, after = divergence(untuned, original, ids), divergence(tuned[0], original, ids)
    print(f"KL {before:.4f} -> {after:.4f}")
    assert after < 0.95 * before


def test_only_outlier_weights_change(tuned, untuned) -> None:
    wanted, got = untuned.state_dict(), tuned[0].state_dict()
    assert got.keys() == wanted.keys()
    changed = {name for name in wanted if not torch.equal(got[name], wanted[name])}
    assert changed
    assert all(name.endswith("outlier.weight") for name in changed)


def test_the_checkpoint_computes_what_the_model_in_memory_does(tuned, logits_of) -> None:
    model, folder = tuned
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(model))
    assert "OutlierLoRA" in (folder / "recipe.yaml").read_text()


def test_the_adapter_is_merged_and_nothing_of_peft_is_left(tuned) -> None:
    model, folder = tuned
    for name, module in model.named_modules():
        if isinstance(module, QuadLinear):
            assert isinstance(module.residual, PackedLinear), name
            assert type(module.outlier.weight) is torch.nn.Parameter
    assert not hasattr(model, "peft_config")
    record = json.loads((folder / "tuning.json").read_text())
    assert (record["data"], record["steps"], record["loss"]) == ("the calibration data", 48, "distillation")
    assert not model.training


def test_next_token_needs_no_original(make_toy, compress, token_ids, monkeypatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("the original model was asked")

    monkeypatch.setattr("quad_peft.training.teacher.cache_teacher", forbidden)
    ids = token_ids()
    tuning = OutlierLoRA(loss="next_token", epochs=6, learning_rate=3e-3, batch_size=2)
    before, after = compress(make_toy(), *before_tuning()), compress(make_toy(), *before_tuning(), tuning)
    losses = [float(model(ids, labels=ids).loss) for model in (before, after)]
    print(losses)
    assert losses[1] < losses[0] - 0.02


def test_scales_and_packed_head(make_toy, compress, logits_of, tmp_path) -> None:
    tuning = OutlierLoRA(
        train_weight_scales=True, epochs=4, learning_rate=3e-4, batch_size=2, gradient_checkpointing=True
    )
    before = compress(make_toy("qwen2"), *before_tuning(), EmbeddingHeadQuant())
    model = compress(make_toy("qwen2"), *before_tuning(), EmbeddingHeadQuant(), tuning, output_dir=tmp_path / "out")
    old, new = residuals(before), residuals(model)
    assert all(torch.equal(old[name], new[name]) for name in old)
    scales = [
        not torch.equal(a.residual.weight_scale, b.residual.weight_scale)
        for a, b in zip(before.modules(), model.modules(), strict=True)
        if isinstance(a, QuadLinear)
    ]
    assert all(scales)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits_of(model))
    assert not model.is_gradient_checkpointing


def test_it_comes_last() -> None:
    modifiers = before_tuning()
    assert validate_modifiers([*modifiers, OutlierLoRA()]) == []
    for position in range(3):
        moved = [*modifiers[:position], OutlierLoRA(), *modifiers[position:]]
        problems = [each for each in validate_modifiers(moved) if each.severity == "error"]
        assert problems, position
        assert any("OutlierLoRA" in each.message for each in problems)


def test_bad_input(make_toy, compress, token_ids) -> None:
    with pytest.raises(ValueError, match="no weight is quantized; put OutlierSplitGPTQ before it"):
        compress(make_toy(), SVDOutlierProjection(rank=8), OutlierLoRA())
    with pytest.raises(ValueError, match="no outlier weights"):
        compress(make_toy(), SVDOutlierProjection(rank=0), DynamicActQuant(), OutlierSplitGPTQ(), OutlierLoRA())
    with pytest.raises(ValueError, match="temperature"):
        OutlierLoRA(temperature=0)
