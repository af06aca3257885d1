"""Company of llm-compressor's own modifiers, and its own entry point."""

from __future__ import annotations

import logging

import pytest
import torch
from quad_kernels import InputQuantization
from torch.utils.data import DataLoader

from quad_modifiers.nn.quad_linear import QuadLinear

pytest.importorskip("llmcompressor")
from llmcompressor import oneshot as stock_oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM

from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection

IGNORE = ["lm_head", "re:.*outlier$"]


def weights(bits: int = 4, **arguments) -> dict:
    strategy = "group" if "group_size" in arguments else "channel"
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, **arguments}


def groups(**scheme) -> dict:
    return {"group_0": {"targets": ["Linear"], **scheme}}


@pytest.mark.parametrize("basis", ["extended", "square"])
@pytest.mark.parametrize(
    "arguments", [{}, {"group_size": 8}, {"symmetric": False}], ids=["channel", "group", "asymmetric"]
)
@pytest.mark.parametrize("stock", [GPTQModifier, QuantizationModifier])
def test_stock_quantizer_on_the_residual(
    stock, arguments, basis, make_toy, compress, logits_of, tmp_path, assert_same_function
) -> None:
    model = make_toy("qwen2")
    wanted = logits_of(model)
    scheme = groups(weights=weights(**arguments))
    compress(
        model,
        SVDOutlierProjection(rank=8, basis=basis),
        stock(ignore=IGNORE, config_groups=scheme),
        output_dir=tmp_path / "out",
    )
    got = logits_of(model)
    error = float((got - wanted).norm() / wanted.norm())
    print(f"relative error {error:.3f}")
    assert 1e-3 < error < 0.5
    for module in model.modules():
        if isinstance(module, QuadLinear):
            assert module.is_quantized
            assert module.outlier is None or getattr(module.outlier, "quantization_scheme", None) is None
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_function(logits_of(reloaded), got, bound=1e-5)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("strategy", [{"strategy": "token"}, {"strategy": "group", "group_size": 8}], ids=str)
def test_stock_activation_quantization_is_kept(strategy, symmetric, make_toy, compress, tmp_path) -> None:
    """A checkpoint must never silently compute something else than the model in memory."""
    inputs = {"num_bits": 4, "type": "int", "symmetric": symmetric, "dynamic": True, **strategy}
    stock = QuantizationModifier(ignore=IGNORE, config_groups=groups(weights=weights(), input_activations=inputs))
    compress(make_toy("llama"), SVDOutlierProjection(rank=8), stock, output_dir=tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = {(m.quantize_input, m.input_quantization) for m in reloaded.modules() if isinstance(m, QuadLinear)}
    assert found == {(True, InputQuantization(4, 1.0, strategy.get("group_size"), symmetric=symmetric))}


def test_stock_activation_quantization_without_a_place_in_the_format_is_refused(make_toy, compress, tmp_path) -> None:
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    stock = QuantizationModifier(ignore=IGNORE, config_groups=groups(weights=weights(), input_activations=inputs))
    with pytest.raises(ValueError, match="DynamicActQuant"):
        compress(make_toy("llama"), SVDOutlierProjection(rank=8), stock, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_activation_ordered_groups_are_stored_right_or_refused(
    make_toy, compress, logits_of, tmp_path, assert_same_function
) -> None:
    """actorder "group" gives groups of columns that are not neighbours."""
    model = make_toy("llama")
    scheme = groups(weights=weights(group_size=8, actorder="group"))
    try:
        compress(
            model,
            SVDOutlierProjection(rank=8),
            GPTQModifier(ignore=IGNORE, config_groups=scheme),
            output_dir=tmp_path / "out",
        )
    except ValueError:
        assert not (tmp_path / "out").exists()
        return
    got = logits_of(model)
    assert_same_function(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), got, bound=1e-4)


def test_quantized_head_is_refused_with_advice(make_toy, compress, tmp_path) -> None:
    """The format has no place for its scales: the checkpoint could not be loaded."""
    stock = QuantizationModifier(ignore=["re:.*outlier$"], config_groups=groups(weights=weights()))
    with pytest.raises(ValueError, match=r"lm_head is quantized.*ignore"):
        compress(make_toy("llama"), SVDOutlierProjection(rank=8), stock, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def float32_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics are collected in bfloat16 where that is fast, which would hide small differences."""
    monkeypatch.setattr("quad_modifiers.passes.calibration_stream.fast_dtype", lambda device: torch.float32)


def largest_change(left, right) -> dict[str, float]:
    """Largest relative difference of each tensor."""
    other = right.state_dict()
    return {
        name: float((tensor - other[name]).abs().max() / tensor.abs().max())
        for name, tensor in left.state_dict().items()
    }


@pytest.mark.parametrize("biases", [False, True], ids=["no biases", "biases"])
def test_smoothquant_before_the_projection_smooths(
    biases, make_toy, compress, logits_of, assert_same_function, float32_segments
) -> None:
    """Between up_proj and down_proj the scales stay in the weights."""

    def toy():
        return make_toy("llama", mlp_bias=biases)

    wanted = logits_of(toy())
    mappings = [[["re:.*down_proj$"], "re:.*up_proj$"]]
    smoothing = SmoothQuantModifier(smoothing_strength=0.8, mappings=mappings)
    smooth = compress(toy(), smoothing, SVDOutlierProjection(rank=8))
    plain = compress(toy(), SVDOutlierProjection(rank=8))
    changes = largest_change(smooth, plain)
    assert changes["model.layers.0.mlp.up_proj.residual.weight"] > 0.1
    assert changes["model.layers.1.mlp.down_proj.residual.weight"] > 0.1
    assert_same_function(logits_of(plain), wanted)
    assert_same_function(logits_of(smooth), wanted)


def test_smoothing_of_norms_cancels_in_the_projection(make_toy, compress, float32_segments) -> None:
    """SmoothQuant's own mappings divide a norm and multiply its readers; the projection folds one into the other."""
    smooth = compress(make_toy("llama"), SmoothQuantModifier(smoothing_strength=0.8), SVDOutlierProjection(rank=8))
    plain = compress(make_toy("llama"), SVDOutlierProjection(rank=8))
    assert max(largest_change(smooth, plain).values()) < 1e-3


@torch.no_grad()
def test_smoothquant_reaches_the_wrapped_linears(make_toy, compress, logits_of, assert_same_function) -> None:
    """In company of a modifier that wraps the linears but does not rotate them, norm and readers change."""
    original = make_toy("llama")
    wanted = logits_of(original)
    quantizer = DynamicActQuant(u_type_bits=None, d_type_bits=None)
    model = compress(make_toy("llama"), SmoothQuantModifier(smoothing_strength=0.8), quantizer)
    layer, old = model.model.layers[0], original.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, QuadLinear)
    scales = old.input_layernorm.weight / layer.input_layernorm.weight
    assert float(scales.max() / scales.min()) > 2
    torch.testing.assert_close(
        layer.self_attn.q_proj.residual.weight, old.self_attn.q_proj.weight * scales, rtol=1e-4, atol=1e-5
    )
    assert_same_function(logits_of(model), wanted)


@pytest.mark.parametrize(
    "modifiers",
    [
        lambda: [SVDOutlierProjection(rank=8), OutlierSplitGPTQ()],
        lambda: [SmoothQuantModifier(), SVDOutlierProjection(rank=8)],
    ],
)
def test_sequential_pipeline_is_refused(modifiers, make_toy, compress) -> None:
    with pytest.raises(ValueError, match=r"calibrate one after the other.*pipeline='independent'"):
        compress(make_toy("llama"), *modifiers(), pipeline="sequential")


RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 4}
"""


@pytest.fixture
def few_default_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quad_modifiers.modifiers.base.DEFAULT_SAMPLES", 6)
    monkeypatch.setattr("quad_modifiers.modifiers.base.DEFAULT_LENGTH", 64)


def test_llm_compressors_own_oneshot_with_default_text(
    toy_checkpoint, tmp_path, logits_of, few_default_windows, caplog
) -> None:
    """`import quad_modifiers; from llmcompressor import oneshot` without a data set."""
    with caplog.at_level(logging.INFO, logger="quad_modifiers"):
        model = stock_oneshot(
            model=str(toy_checkpoint("llama")), recipe=RECIPE, output_dir=str(tmp_path / "out"), log_dir=None
        )
    assert "Wikipedia" in caplog.text
    assert all(m.is_quantized for m in model.modules() if isinstance(m, QuadLinear))
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "tokenizer.json"} <= files
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(reloaded), logits_of(model))


def test_llm_compressors_own_oneshot_ignores_padding(toy_checkpoint, token_ids) -> None:
    """A user's DataLoader with an attention mask: padded and unpadded samples give the same model."""
    ids = token_ids(8, 40)
    lengths = (40, 9, 33, 40, 21, 40, 5, 40)
    padded, single = [], []
    for start in (0, 4):
        rows, mask = ids[start : start + 4].clone(), torch.zeros(4, 40, dtype=torch.int64)
        for row, length in enumerate(lengths[start : start + 4]):
            rows[row, length:] = 2
            mask[row, :length] = 1
            single.append({"input_ids": ids[start + row : start + row + 1, :length]})
        padded.append({"input_ids": rows, "attention_mask": mask})
    recipe = "quad_stage:\n  quad_modifiers:\n    SVDOutlierProjection: {rank: 8, down_proj_rank: 4}\n"
    models = [
        stock_oneshot(
            model=str(toy_checkpoint("llama")),
            recipe=recipe,
            dataset=DataLoader(batches, batch_size=None),
            log_dir=None,
        )
        for batches in (padded, single)
    ]
    left, right = (model.model.layers[0].self_attn.q_proj.outlier.weight for model in models)
    torch.testing.assert_close(left, right, rtol=2e-2, atol=2e-3)
