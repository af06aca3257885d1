"""An outlier adapter, whose A is no real matrix, goes through everything that one of PEFT's own goes through."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quad_modifiers.nn.quad_linear import QuadLinear
from quad_peft import OutlierLoraConfig, QuadLoraLayer, equalize_outliers, get_outlier_model
from quad_peft.selector import OutlierSelector

from .test_adapter import PROBE, logits, shake

Load = Callable[..., PreTrainedModel]


def adapted(load: Load, **fields: object) -> PeftModel:
    """A model with a trained adapter whose A has scales."""
    model = get_outlier_model(load(), OutlierLoraConfig(**fields))
    equalize_outliers(model, PROBE)
    shake(model)
    return model.eval()


@pytest.mark.parametrize("scales", [False, True])
class TestLoading:
    def test_without_memory_for_its_first_values(self, scales: bool, load: Load, tmp_path: Path) -> None:
        model = adapted(load, train_weight_scales=scales)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(load(), tmp_path, low_cpu_mem_usage=True)
        assert not any(parameter.is_meta for parameter in again.parameters())
        assert torch.equal(logits(again), logits(model))
        again.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
        again.set_adapter("second")
        assert torch.equal(logits(again), logits(model))

    @pytest.mark.usefixtures("peft_for_transformers")
    def test_by_transformers_itself(self, scales: bool, load: Load, tmp_path: Path) -> None:
        model = adapted(load, train_weight_scales=scales)
        plain = logits(load())
        model.save_pretrained(tmp_path)
        base = load()
        base.load_adapter(str(tmp_path), adapter_name="mine")
        assert torch.equal(logits(base), logits(model))
        base.disable_adapters()
        assert torch.equal(logits(base), plain)
        base.enable_adapters()
        assert torch.equal(logits(base), logits(model))

    def test_state_dict(self, scales: bool, load: Load) -> None:
        model = adapted(load, train_weight_scales=scales)
        snapshot = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for assign in (False, True):
            other = get_outlier_model(load(), OutlierLoraConfig(train_weight_scales=scales))
            done = other.load_state_dict(snapshot, assign=assign)
            assert (done.missing_keys, done.unexpected_keys) == ([], [])
            assert torch.equal(logits(other), logits(model))

    def test_copies(self, scales: bool, load: Load) -> None:
        model = adapted(load, train_weight_scales=scales)
        expected = logits(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(logits(twin), expected)
            shake(twin, seed=3)
            assert torch.equal(logits(model), expected)


@pytest.mark.usefixtures("peft_for_transformers")
def test_transformers_adds_and_saves_one(load: Load, tmp_path: Path) -> None:
    model = load()
    model.add_adapter(OutlierLoraConfig(), adapter_name="mine")
    shake(model, "mine")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(), tmp_path)), logits(model))


def test_the_folder_of_an_adapter_loads_its_base(load: Load, quad_folder, tmp_path: Path) -> None:
    model = adapted(load)
    model.peft_config["default"].base_model_name_or_path = str(quad_folder())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_a_selector_of_other_coordinates_is_refused_by_transformers_too(load: Load) -> None:
    model = adapted(load)
    selector = next(module for module in model.modules() if isinstance(module, OutlierSelector))
    with pytest.raises(ValueError, match="does not select the 8 outlier coordinates"):
        selector.weight = nn.Parameter(selector.weight.clone().roll(1, dims=1))


def test_writing_to_the_selector_is_an_error(load: Load, tmp_path: Path) -> None:
    model = adapted(load)
    layer = next(module for module in model.modules() if isinstance(module, QuadLoraLayer))
    for write in (lambda weight: weight.data.mul_(2), nn.init.zeros_, lambda weight: weight.__setitem__(0, 1.0)):
        with pytest.raises(ValueError, match="the A of an outlier adapter picks the outlier coordinates"):
            write(layer.lora_A["default"].weight)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be written to"):  # it copies into the old A
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert torch.equal(logits(model), expected)


class TestMixedBatches:
    """While gradients are recorded, as a server without `no_grad` does."""

    @pytest.mark.parametrize("kind", [OutlierLoraConfig, LoraConfig])
    def test_each_request_has_its_adapter(self, kind: type[LoraConfig], load: Load) -> None:
        fields = {"r": 4, "target_modules": ["q_proj", "down_proj"]} if kind is LoraConfig else {}
        model = get_peft_model(load(), kind(**fields), adapter_name="first")
        model.add_adapter("second", kind(**fields))
        shake(model, "first")
        shake(model, "second", seed=1)
        model.eval()
        for module in model.modules():
            if isinstance(module, QuadLinear):
                module.quantize_input = False  # the last bit of a float32 sum may move an input to the next grid point
        probe = PROBE[[0, 1, 0]]
        mixed = model(probe, adapter_names=["second", "__base__", "first"]).logits
        assert mixed.requires_grad
        with torch.no_grad(), model.disable_adapter():
            torch.testing.assert_close(mixed[1], model(probe).logits[1], rtol=1e-3, atol=1e-3)
        for row, name in ((0, "second"), (2, "first")):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[row], logits(model)[0], rtol=1e-3, atol=1e-3)

    def test_compiled(self, load: Load) -> None:
        torch._dynamo.reset()
        model = adapted(load)
        names = {"adapter_names": ["default", "__base__"]}
        expected = logits(model, **names)
        assert torch.equal(logits(torch.compile(model, backend="aot_eager"), **names), expected)

    def test_generation(self, load: Load) -> None:
        model = adapted(load)
        names = {"adapter_names": ["default", "__base__"]}
        text = model.generate(input_ids=PROBE, max_new_tokens=4, min_new_tokens=4, do_sample=False, **names)
        with model.disable_adapter():
            plain = model.generate(input_ids=PROBE[1:], max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(text[1:], plain)


class TestMerged:
    def test_cast_while_merged(self, load: Load) -> None:
        model = adapted(load, train_weight_scales=True)
        model.merge_adapter()
        model.to(torch.bfloat16)
        model.unmerge_adapter()
        layer = next(module for module in model.modules() if isinstance(module, QuadLinear))
        assert (layer.outlier_weight.dtype, layer.weight_scale.dtype) == (torch.bfloat16, torch.bfloat16)
        assert bool(torch.isfinite(logits(model)).all())

    def test_copied_while_merged(self, load: Load) -> None:
        model = adapted(load)
        with model.disable_adapter():
            plain = logits(model)
        model.merge_adapter()
        twin = copy.deepcopy(model)
        twin.unmerge_adapter()
        with twin.disable_adapter():
            assert torch.equal(logits(twin), plain)


class TestScaling:
    def test_all_of_an_adapter_is_rescaled(self, load: Load) -> None:
        model = adapted(load, train_weight_scales=True)
        with model.disable_adapter():
            plain = logits(model)
        with rescale_adapter_scale(model, 0.0):
            assert torch.equal(logits(model), plain)

    @pytest.mark.parametrize(
        "fields", [{"lora_alpha": 16}, {"rank_pattern": {"q_proj": 3}}, {"alpha_pattern": {"q_proj": 3}}], ids=str
    )
    def test_scaling_that_would_be_ignored(self, fields: dict[str, object], load: Load) -> None:
        with pytest.raises(ValueError, match="comes from the model"):
            get_outlier_model(load(), OutlierLoraConfig(**fields))


def test_packed_numbers_are_counted(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    base = load()
    model = get_outlier_model(base)
    trainable, total = model.get_nb_trainable_parameters()
    assert total == base.num_parameters()
    model.print_trainable_parameters()
    assert f"all params: {total:,}" in capsys.readouterr().out
    assert total > 3 * sum(parameter.numel() for name, parameter in base.named_parameters() if "layers" in name)
    assert trainable == model.num_parameters(only_trainable=True)


NVFP4 = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 16, o_proj_rank_per_head: 2, down_proj_rank: 4}
    DynamicActQuant: {number_format: nvfp4}
    OutlierSplitGPTQ: {number_format: nvfp4}
"""


def test_of_floating_point_numbers_the_outliers_are_trained_alone(make_quad_toy, tmp_path: Path) -> None:
    _, folder = make_quad_toy(NVFP4, size="even")
    for what in ("train_weight_scales", "train_weights"):
        with pytest.raises(ValueError, match=r"q_proj has numbers of nvfp4, whose (scales|integers) are not trained"):
            get_outlier_model(AutoModelForCausalLM.from_pretrained(folder), OutlierLoraConfig(**{what: True}))
    model = get_outlier_model(AutoModelForCausalLM.from_pretrained(folder), OutlierLoraConfig())
    before = logits(model)
    model(input_ids=PROBE, labels=PROBE).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter -= parameter.grad
    assert not torch.equal(logits(model), before)
    changed = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), changed, rtol=1e-4, atol=1e-4)
