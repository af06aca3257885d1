"""The toys themselves: what other tests rely on them for."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from quad_modifiers.model.architecture import BUILTIN_ARCHITECTURES

ARCHITECTURES = [architecture.model_type for architecture in BUILTIN_ARCHITECTURES]
BIASED = ("ernie4_5", "glm", "qwen2", "seed_oss")


@pytest.mark.parametrize("size", ["even", "mha", "odd", "odder"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_toy_runs_and_repeats(make_toy, toy_sizes, model_type, size):
    model = make_toy(model_type, size)
    logits = model(input_ids=torch.arange(10)[None]).logits
    assert model.config.hidden_size == toy_sizes[size]["hidden_size"]
    assert logits.isfinite().all()
    assert logits.std() > 0.5
    assert torch.equal(logits, make_toy(model_type, size)(input_ids=torch.arange(10)[None]).logits)
    assert not torch.equal(logits, make_toy(model_type, size, seed=1)(input_ids=torch.arange(10)[None]).logits)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_nothing_a_rotation_could_break_is_trivial(make_toy, model_type):
    model = make_toy(model_type)
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0, name
    assert model.model.embed_tokens.weight.mean(dim=0).abs().mean() > 0.1
    assert any(name.endswith("q_proj.bias") for name, _ in model.named_parameters()) == (model_type in BIASED)
    assert any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()) == (
        model_type in ("apertus", "qwen3")
    )


def test_tied_embeddings(make_toy):
    model = make_toy("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tokenizer_round_trip(toy_tokenizer):
    text = "Seven wizards: ünïcödé, 42!\n"
    ids = toy_tokenizer(text)["input_ids"]
    assert toy_tokenizer.decode(ids) == text
    assert len(toy_tokenizer) == 320
    assert max(ids) < 320


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_checkpoint_reloads(toy_checkpoint, make_toy, model_type):
    folder = toy_checkpoint(model_type)
    assert folder == toy_checkpoint(model_type)
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("the lazy dog")["input_ids"]])
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(reloaded(input_ids=ids).logits, make_toy(model_type)(input_ids=ids).logits)
