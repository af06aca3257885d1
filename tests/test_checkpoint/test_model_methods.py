"""transformers' methods of a model that ask for sizes or exchange embedding and head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.packed_table import PackedEmbedding, PackedHead, TiedHead

PACKED = """
quad_stage:
  quad_modifiers:
    DynamicActQuant: {}
    EmbeddingHeadQuant: {}
    OutlierSplitGPTQ: {bits: 4, method: rtn}
"""
LONGER = torch.tensor([[5, 320, 6, 323]])


@pytest.fixture(scope="module", params=["tied", "untied"])
def packed(request, compress_toy):
    return compress_toy(PACKED, tie_word_embeddings=request.param == "tied")


def load(checkpoint) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint.folder).eval()


class TestSizes:
    def test_repacked_weights_are_part_of_the_footprint(self, compressed) -> None:
        model = load(compressed)
        repacked = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert all(module.weight_packed.numel() == 0 for module in repacked)
        held = model.get_memory_footprint()
        words = {name: tensor for name, tensor in model.state_dict().items() if name.endswith("weight_packed")}
        stored = sum(tensor.numel() * tensor.element_size() for tensor in words.values())
        assert held > stored + model.get_memory_footprint(return_buffers=False)
        # The words lie in memory now; the kernels' rows of 64 inputs take more than these narrow layers fill.
        assert stored < model.get_memory_footprint() <= held

    def test_each_number_of_a_packed_weight_is_a_parameter(self, packed, make_toy) -> None:
        model, tied = load(packed), isinstance(load(packed).lm_head, TiedHead)
        original = make_toy(tie_word_embeddings=tied)
        assert model.num_parameters() == original.num_parameters()
        without = model.num_parameters(exclude_embeddings=True)
        assert without == original.num_parameters(exclude_embeddings=True)
        assert model.num_parameters(only_trainable=True) == sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )

    def test_stand_ins_have_the_sizes_of_what_they_stand_for(self, packed) -> None:
        model = load(packed)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert (embedding.num_embeddings, embedding.embedding_dim) == (320, 64)
        assert (head.in_features, head.out_features, head.bias) == (64, 320, None)


class TestResizing:
    @pytest.mark.parametrize("mean", [True, False])
    def test_packed_tables_grow(self, mean, packed, logits_of, tmp_path) -> None:
        model = load(packed)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        embedding = model.resize_token_embeddings(324, mean_resizing=mean)
        assert embedding is model.get_input_embeddings()
        assert isinstance(embedding, PackedEmbedding)
        assert (embedding.num_embeddings, model.lm_head.out_features, model.config.vocab_size) == (324, 324, 324)
        for name, tensor in before.items():
            if name.startswith(("model.embed_tokens", "lm_head")) and not name.endswith("shape"):
                assert torch.equal(model.state_dict()[name][:320], tensor), name
        assert bool(torch.isfinite(embedding.weight).all())
        assert float(embedding.weight[320:].abs().max()) > 0
        assert torch.equal(logits_of(model)[..., :320], packed.logits)
        with torch.no_grad():
            wanted = model(LONGER).logits
        assert wanted.shape[-1] == 324
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(LONGER).logits, wanted)

    def test_packed_tables_shrink_and_stay(self, packed, logits_of) -> None:
        model = load(packed)
        model.resize_token_embeddings(320)
        assert torch.equal(logits_of(model), packed.logits)
        model.resize_token_embeddings(pad_to_multiple_of=64)
        assert torch.equal(logits_of(model), packed.logits)
        model.resize_token_embeddings(100)
        assert model.lm_head.weight.shape == model.model.embed_tokens.weight.shape == (100, 64)

    def test_floating_point_ends_of_a_quantized_model(self, compressed, logits_of, tmp_path) -> None:
        model = load(compressed)
        model.resize_token_embeddings(324)
        torch.testing.assert_close(logits_of(model)[..., :320], compressed.logits)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits_of(again), logits_of(model))


class TestExchanging:
    def test_a_tied_head_follows_the_embedding(self, compress_toy, logits_of) -> None:
        made = compress_toy(PACKED, tie_word_embeddings=True)
        model, other = load(made), load(made)
        other.model.embed_tokens.weight_scale *= 0.5
        model.set_input_embeddings(other.get_input_embeddings())
        model.tie_weights()
        assert torch.equal(logits_of(model), logits_of(other))

    def test_another_kind_is_refused_by_name(self, packed, logits_of) -> None:
        model = load(packed)
        with pytest.raises(ValueError, match="an 8-bit embedding, and a Embedding cannot take the place"):
            model.set_input_embeddings(nn.Embedding(320, 64))
        with pytest.raises(ValueError, match="an 8-bit head, and a Linear cannot take the place"):
            model.set_output_embeddings(nn.Linear(64, 320, bias=False))
        assert torch.equal(logits_of(model), packed.logits)

    def test_any_may_be_exchanged_where_both_are_floating_point(self, compressed) -> None:
        model = load(compressed)
        new = nn.Embedding.from_pretrained(model.get_input_embeddings().weight.clone())
        model.set_input_embeddings(new)
        assert model.get_input_embeddings() is new


WRITES = {
    "copied": lambda weight: weight.data.copy_(torch.zeros_like(weight)),
    "a row set": lambda weight: weight.__setitem__(3, 0.0),
    "a view filled": lambda weight: weight[3].fill_(0.0),
    "data assigned": lambda weight: setattr(weight, "data", torch.zeros(320, 64)),
    "initialised": nn.init.normal_,
    "added to": lambda weight: weight.detach().add_(1.0),
    "out of a sum": lambda weight: torch.add(weight, 1.0, out=weight),
    "made trainable": lambda weight: weight.requires_grad_(),
}


class TestComputedWeights:
    @pytest.mark.parametrize("how", WRITES)
    def test_writing_is_an_error(self, how, packed) -> None:
        model = load(packed)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            with pytest.raises(ValueError, match=r"the weight of a Packed\w+ is computed from its 8-bit integers"):
                WRITES[how](module.weight)

    def test_reading_gives_ordinary_tensors(self, packed) -> None:
        weight = load(packed).get_input_embeddings().weight
        product = torch.randn(2, 64, requires_grad=True) @ weight.T
        product.sum().backward()
        assert {type(tensor) for tensor in (product, weight + 1, weight.clone())} == {torch.Tensor}
        torch.zeros(320, 64).copy_(weight)

    def test_head_and_embedding_have_names(self, packed) -> None:
        model = load(packed)
        assert isinstance(model.get_output_embeddings(), (PackedHead, TiedHead))
