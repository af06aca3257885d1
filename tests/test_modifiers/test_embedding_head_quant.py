"""EmbeddingHeadQuant: 8-bit embedding and head, alone and in company."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("llmcompressor")
from llmcompressor.modifiers.gptq import GPTQModifier

from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
from quad_modifiers.modifiers.embedding_head_quant import EmbeddingHeadQuant
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection
from quad_modifiers.nn.native_block import NativeHead
from quad_modifiers.nn.packed_table import PackedEmbedding, PackedHead, TiedHead
from quad_modifiers.recipe import validate_modifiers


def test_rows_are_rounded_to_their_own_grid(make_toy, compress) -> None:
    model = make_toy(vocab_size=5000)  # more rows than are quantized at a time
    before = [model.model.embed_tokens.weight.detach().clone(), model.lm_head.weight.detach().clone()]
    compress(model, EmbeddingHeadQuant())
    for table, weight in zip((model.model.embed_tokens, model.lm_head), before, strict=True):
        assert tuple(table.weight_packed.shape) == (5000, weight.shape[1] // 4)
        assert tuple(table.weight_scale.shape) == (5000, 1)
        torch.testing.assert_close(table.weight_scale, weight.abs().amax(1, keepdim=True) / 127.5)
        error = (table.weight - weight).abs() / table.weight_scale
        print(f"largest error {float(error.max()):.3f} steps, bound 0.501")  # 127.5 steps are rounded to 127
        assert float(error.max()) < 0.501
        assert float(error.max()) > 0.3


def test_head_agrees_however_many_tokens(tolerance) -> None:
    generator = torch.Generator().manual_seed(0)
    for columns in (64, 63):
        head = PackedHead(5000, columns, torch.bfloat16)
        integers = torch.randint(-128, 128, (5000, columns), generator=generator, dtype=torch.int8)
        head.fill(0, integers, torch.rand(5000, 1, generator=generator) / 100)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x = torch.randn(3, 7, columns, generator=generator).to(dtype)
            wanted = x.double() @ (integers.double() * head.weight_scale.double()).T
            for y, reference in ((head(x), wanted), (head(x[:1, :2]), wanted[:1, :2])):
                assert y.dtype == dtype
                torch.testing.assert_close(y.double(), reference, **tolerance(min(dtype, torch.float32, key=_bits)))


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def test_gradient_passes_through_the_head(make_toy, compress) -> None:
    model = compress(make_toy(), EmbeddingHeadQuant())
    x = torch.randn(1, 2, 64, requires_grad=True)
    model.lm_head(x).sum().backward()
    torch.testing.assert_close(x.grad[0, 0], model.lm_head.weight.sum(0), rtol=1e-4, atol=1e-4)


def test_function_changes_little(make_toy, compress, logits_of, assert_same_function) -> None:
    for tied in (False, True):
        model = make_toy("qwen2", "odder", tie_word_embeddings=tied)
        wanted = logits_of(model)
        got = logits_of(compress(model, EmbeddingHeadQuant()))
        assert not torch.equal(got, wanted)
        assert_same_function(got, wanted, 4e-2)


def test_a_shared_tensor_stays_shared(make_toy, compress) -> None:
    model = compress(make_toy(tie_word_embeddings=True), EmbeddingHeadQuant())
    assert model.config.tie_word_embeddings
    assert [name for name in model.state_dict() if "lm_head" in name] == []
    torch.testing.assert_close(model.lm_head.weight, model.model.embed_tokens.weight)


def test_one_target(make_toy, compress) -> None:
    model = compress(make_toy(), EmbeddingHeadQuant(targets=["lm_head"]))
    assert type(model.model.embed_tokens) is nn.Embedding
    assert type(model.lm_head) is PackedHead
    model = compress(make_toy(), EmbeddingHeadQuant(targets=["embed_tokens"]))
    assert type(model.model.embed_tokens) is PackedEmbedding
    assert type(model.lm_head) in (nn.Linear, NativeHead)


@pytest.mark.parametrize("position", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_anywhere_after_the_projection(tied, position, make_toy, compress, logits_of, assert_same_function) -> None:
    def modifiers():
        projection = SVDOutlierProjection(rank=8, keep_tied=tied)
        return [projection, DynamicActQuant(u_type_bits=8, d_type_bits=8), OutlierSplitGPTQ(bits=8)]

    with_ends = modifiers()
    with_ends.insert(position, EmbeddingHeadQuant())
    wanted = logits_of(compress(make_toy(tie_word_embeddings=True), *modifiers()))
    model = compress(make_toy(tie_word_embeddings=True), *with_ends)
    assert type(model.lm_head) is (TiedHead if tied else PackedHead)
    assert_same_function(logits_of(model), wanted, 3e-2)


def test_before_the_projection_is_an_error() -> None:
    (problem,) = validate_modifiers([EmbeddingHeadQuant(), SVDOutlierProjection(rank=8)])
    assert "rotate weights that are quantized already" in problem.message


def test_company_of_quantizers_that_leave_the_head_alone() -> None:
    assert validate_modifiers([EmbeddingHeadQuant(), OutlierSplitGPTQ()]) == []
    stock = {"targets": ["Linear"], "scheme": "W4A16"}
    assert validate_modifiers([EmbeddingHeadQuant(), GPTQModifier(ignore=["lm_head"], **stock)]) == []
    (problem,) = validate_modifiers([EmbeddingHeadQuant(), GPTQModifier(**stock)])
    assert "such as lm_head" in problem.message


def test_bad_input(make_toy, compress) -> None:
    with pytest.raises(ValueError, match=r"share one tensor, so both are quantized or none; write targets"):
        compress(make_toy(tie_word_embeddings=True), EmbeddingHeadQuant(targets=["lm_head"]))
    with pytest.raises(ValueError, match=r"share one tensor.*keep_tied: false"):
        compress(
            make_toy(tie_word_embeddings=True), SVDOutlierProjection(rank=8), EmbeddingHeadQuant(targets=["lm_head"])
        )
    biased = make_toy()
    biased.lm_head = nn.Linear(64, 320)
    with pytest.raises(ValueError, match=r"lm_head has a bias.*write targets: \[embed_tokens\]"):
        compress(biased, EmbeddingHeadQuant())
    odd = make_toy()
    odd.lm_head = nn.Sequential(odd.lm_head)
    with pytest.raises(ValueError, match="lm_head a Sequential: start from the original"):
        compress(odd, EmbeddingHeadQuant())
    with pytest.raises(ValueError, match="targets"):
        EmbeddingHeadQuant(targets=["Embedding"])
    with pytest.raises(ValueError, match="bits"):
        EmbeddingHeadQuant(bits=4)
