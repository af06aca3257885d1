"""The weights of a loaded model go out and in again as those of any model: snapshots, copies, another instance."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear

PROMPT = torch.tensor([[5, 17, 40, 8]])
TABLES = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    DynamicActQuant: {}
    EmbeddingHeadQuant: {}
    OutlierSplitGPTQ: {bits: 4, method: rtn, group_size: 8, symmetric: false}
"""
FOLDED = TABLES.replace("    SVDOutlierProjection: {rank: 8}\n", "")


@pytest.fixture(scope="module", params=["split", "tables", "tied"])
def checkpoint(request, compress_toy, compressed):
    if request.param == "split":
        return compressed
    return compress_toy(TABLES if request.param == "tables" else FOLDED, tie_word_embeddings=request.param == "tied")


def load(checkpoint) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()


def spoil(model: PreTrainedModel) -> None:
    """Gives every weight another value."""
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("weight_packed"):
            state[name] = tensor.flip(0)
        elif tensor.is_floating_point():
            state[name] = tensor * 0.5
    model.load_state_dict(state)


def generated(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(PROMPT, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("backend", [None, "onednn", "reference"])
def test_a_snapshot_brings_everything_back(
    backend, assign, checkpoint, logits_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend is not None:
        monkeypatch.setenv("QUAD_KERNELS", backend)
    model = load(checkpoint)
    wanted, text = logits_of(model), generated(model)
    snapshot = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    spoil(model)
    assert not torch.equal(logits_of(model), wanted)
    assert generated(model).shape == text.shape  # a plan of the spoilt weights
    done = model.load_state_dict(snapshot, assign=assign)
    assert (done.missing_keys, done.unexpected_keys) == ([], [])
    assert torch.equal(logits_of(model), wanted)
    assert torch.equal(generated(model), text)
    assert all(torch.equal(tensor, snapshot[name]) for name, tensor in model.state_dict().items())


def test_weights_of_a_second_instance(checkpoint, logits_of) -> None:
    first, second = load(checkpoint), load(checkpoint)
    spoil(second)
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits_of(second), logits_of(first))


def test_a_state_dict_through_a_file(checkpoint, logits_of) -> None:
    file = io.BytesIO()
    torch.save(load(checkpoint).state_dict(), file)
    file.seek(0)
    model = load(checkpoint)
    spoil(model)
    model.load_state_dict(torch.load(file))
    assert torch.equal(logits_of(model), checkpoint.logits)


def test_a_state_dict_that_does_not_fit_changes_no_packed_weight(checkpoint, logits_of) -> None:
    model = load(checkpoint)
    name = "model.layers.0.self_attn.q_proj.residual.weight_packed"
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({name: torch.zeros(3, 3, dtype=torch.int32)}, strict=False)
    assert torch.equal(logits_of(model), checkpoint.logits)


def test_words_of_another_shape_are_refused(compressed) -> None:
    """Eight 4-bit numbers share a word, so that words alone do not tell a width of 60 from one of 64."""
    model = load(compressed)
    name = "model.layers.0.mlp.up_proj.residual.weight_shape"
    with pytest.raises(RuntimeError, match=r"up_proj\.residual\.weight_shape says \[1, 2\], but the module is of"):
        model.load_state_dict({name: torch.tensor([1, 2])}, strict=False)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_independent(how, checkpoint, logits_of) -> None:
    model = load(checkpoint)
    logits_of(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert torch.equal(logits_of(twin), checkpoint.logits)
    spoil(twin)
    assert not torch.equal(logits_of(twin), checkpoint.logits)
    assert torch.equal(logits_of(model), checkpoint.logits)
    assert torch.equal(generated(model), generated(load(checkpoint)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cast_it_is_what_loading_in_that_dtype_gives(dtype, checkpoint, logits_of) -> None:
    model = load(checkpoint)
    logits_of(model)
    wanted = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype).eval()
    cast = model.to(dtype)
    states = cast.state_dict(), wanted.state_dict()
    assert {tensor.dtype for tensor in states[0].values() if tensor.is_floating_point()} == {dtype}
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    # Casting a stock model rounds the rotary frequencies, too, which turn everything but the first position.
    assert torch.equal(logits_of(cast)[:, 0], logits_of(wanted)[:, 0])


def test_training_flags_leave_packed_weights_alone(checkpoint, logits_of) -> None:
    model = load(checkpoint)
    model.requires_grad_(True)
    assert all(parameter.is_floating_point() for parameter in model.parameters())
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(PROMPT, labels=PROMPT).loss.backward()
    outliers = [module.outlier for module in model.modules() if isinstance(module, QuadLinear) and module.outlier]
    assert all(outlier.weight.grad is not None for outlier in outliers)
    model.gradient_checkpointing_disable()
    model.disable_input_require_grads()
    model.requires_grad_(False)
    assert torch.equal(logits_of(model.eval()), checkpoint.logits)


def test_what_is_returned_may_be_changed_in_place(compressed) -> None:
    """As the result of a Linear may, while gradients are recorded."""
    layer = next(module for module in load(compressed).modules() if isinstance(module, QuadLinear))
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    y = layer(x)
    y[0] += 1
    y.mul_(2).sum().backward()
    twin = x.detach().clone().requires_grad_()
    (2 * layer(twin)).sum().backward()
    assert torch.equal(x.grad, twin.grad)


def test_assigned_tensors_count_after_a_forward_pass(checkpoint, logits_of) -> None:
    model = load(checkpoint)
    wanted = load(checkpoint)
    spoil(wanted)
    logits_of(model)
    for own, other in zip(model.modules(), wanted.modules(), strict=True):
        if isinstance(own, PackedLinear):
            for name, tensor in other.state_dict().items():
                setattr(own, name, tensor)
    rest = {name: tensor for name, tensor in wanted.state_dict().items() if ".residual." not in name}
    model.load_state_dict(rest, strict=False)
    assert torch.equal(logits_of(model), logits_of(wanted))


def test_meta_tensors_are_filled_by_assignment(compressed, logits_of) -> None:
    """A model without memory takes the tensors of another one as its own."""
    filled = load(compressed)
    state = {name: tensor.clone() for name, tensor in filled.state_dict().items()}
    model = load(compressed)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.to("meta")
            assert module.weight_packed.is_meta
    model.load_state_dict(state, assign=True)
    assert torch.equal(logits_of(model), compressed.logits)
