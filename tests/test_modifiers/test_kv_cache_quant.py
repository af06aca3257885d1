"""KVCacheQuant: the same rounded keys and values in every cache, four bits of each in memory."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

pytest.importorskip("llmcompressor")
from quad_modifiers.model.architecture import BUILTIN_ARCHITECTURES
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.dynamic_act_quant import DynamicActQuant
from quad_modifiers.modifiers.kv_cache_quant import KVCacheQuant
from quad_modifiers.modifiers.outlier_split_gptq import OutlierSplitGPTQ
from quad_modifiers.modifiers.svd_outlier_projection import SVDOutlierProjection
from quad_modifiers.nn.kv_cache import BlockRounding, KVCacheFormat, pack_states, unpack_states
from quad_modifiers.nn.kv_lines import Basis
from quad_modifiers.passes.cache_moments import cache_moments
from quad_modifiers.recipe import validate_modifiers
from tests.continuation import PROMPT, TOKENS, at_once, by_tokens

KNOWN = {architecture.model_type: architecture for architecture in BUILTIN_ARCHITECTURES}


SPLIT = {"high_rank": "1/8", "high_bits": 8}


@pytest.fixture(scope="module", params=["llama", "ministral", "phi3", "qwen3", "split llama", "balanced qwen3"])
def rounded(request, make_toy, compress) -> Any:
    """A toy whose keys and values are rounded, and nothing else; where they are split, an eighth of them to 8 bits.

    Ministral's and Phi-3's attention slides, and Phi-3's modules do not say so; Qwen3's heads have 24 numbers.
    """
    *kind, model_type = request.param.split()
    settings = {"split": SPLIT, "balanced": {"key_basis": "balanced"}}
    return compress(make_toy(model_type), KVCacheQuant(**(settings[kind[0]] if kind else {})))


def rounded_states(x: torch.Tensor, form: KVCacheFormat) -> torch.Tensor:
    return unpack_states(pack_states(x, form), form, x.dtype)


def states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 80])
def test_lines(head_dim, dtype) -> None:
    x = states(2, 3, 5, head_dim, dtype=dtype)
    for form in (KVCacheFormat(1.0, False), KVCacheFormat(1.0, True), KVCacheFormat(0.9, True)):
        lines = pack_states(x, form)
        assert lines.dtype == torch.uint8
        assert lines.shape == (2, 3, 5, head_dim // 2 + 2 * dtype.itemsize)
        found = unpack_states(lines, form, dtype)
        assert torch.equal(found, BlockRounding(form, None).round((x, x), 0)[0])
        error = (found - x).float().pow(2).mean() / x.float().var(-1).mean()
        assert 1e-4 < error < 0.02  # of 16 points
    # Lines may be views, as those of a cache are.
    form = KVCacheFormat()
    wanted = unpack_states(pack_states(x, form), form, dtype)[:, :, 2:]
    assert torch.equal(unpack_states(pack_states(x, form)[:, :, 2:], form, dtype), wanted)


def test_the_grid_is_that_of_the_kernels() -> None:
    x = torch.tensor([[0.0, 15.0, 7.2, 1.0]])
    assert torch.equal(rounded_states(x, KVCacheFormat(1.0, False)), torch.tensor([[0.0, 15.0, 7.0, 1.0]]))


def test_the_transform_helps_an_outlying_coordinate() -> None:
    x = states(64, 64)
    x[:, 5] += 40
    plain, spread = (float((rounded_states(x, KVCacheFormat(1.0, h)) - x).norm()) for h in (False, True))
    assert spread < 0.8 * plain


def test_means_and_first_tokens_are_treated_apart() -> None:
    x, mean = states(2, 3, 5, 16), 30 * states(3, 16, seed=1)
    given = x + mean.unsqueeze(1), 2 * x - mean.unsqueeze(1)
    plain, centred = (BlockRounding(KVCacheFormat(0.9), each).round(given, 0) for each in (None, (mean, -mean)))
    for part, without, wanted in zip(centred, plain, given, strict=True):
        assert float((part - wanted).norm()) < 0.2 * float((without - wanted).norm())
    for position, exact in ((0, 2), (1, 1), (2, 0)):
        found = BlockRounding(KVCacheFormat(0.9, True, 2), (mean, -mean)).round(given, position)
        for part, wanted, rounded in zip(found, given, centred, strict=True):
            assert torch.equal(part[:, :, :exact], wanted[:, :, :exact])
            assert torch.equal(part[:, :, exact:], rounded[:, :, exact:])


def test_gradients_pass() -> None:
    keys, values = (states(1, 2, 4, 16, seed=seed).requires_grad_() for seed in (0, 1))
    found = BlockRounding(KVCacheFormat(), (states(2, 16), states(2, 16))).round((keys, values), 0)
    (found[0].sum() + 2 * found[1].sum()).backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))
    assert torch.equal(values.grad, torch.full_like(values, 2))


def test_every_cache_gives_the_same(rounded, make_toy) -> None:
    model = rounded
    wanted = at_once(model)
    plain = at_once(make_toy(model.config.model_type))
    assert float((wanted - plain).norm() / plain.norm()) > 1e-3  # it does something
    capacity = PROMPT.shape[1] + TOKENS.shape[1]
    caches = (None, DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, capacity))
    for past in caches:
        found = by_tokens(model, past)
        assert float((found - wanted).norm() / wanted.norm()) < 2e-2, past


def test_four_bits_are_held(rounded) -> None:
    config = rounded.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        dynamic = rounded(PROMPT, use_cache=True).past_key_values
        static = rounded(PROMPT, past_key_values=StaticCache(rounded.config, 32), use_cache=True).past_key_values
    for past in (dynamic, static):
        for layer in past.layers:
            assert layer.keys.dtype == layer.values.dtype == torch.uint8
            line = size // 2 + 8  # float32 scale and zero
            if hasattr(rounded.model.layers[0], "value_basis"):
                line += size // 8 // 2 + 8  # four more bits of an eighth, and its own scale and zero
            assert layer.keys.shape[-1] == layer.values.shape[-1] == line
            assert layer.keys.shape[:2] == (2, rounded.config.num_key_value_heads)
            for sink in layer.sinks or ():  # no view of the prompt
                assert sink.untyped_storage().nbytes() == sink.numel() * sink.element_size()
        assert int(past.get_seq_length()) == PROMPT.shape[1]


def generated(model: Any, prompt: torch.Tensor, tokens: int = 8, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(prompt, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}],
    ids=["dynamic", "static", "beams"],
)
def test_generate(rounded, options) -> None:
    wanted = generated(rounded, PROMPT, use_cache=False, **{k: v for k, v in options.items() if k == "num_beams"})
    assert torch.equal(generated(rounded, PROMPT, **options), wanted)


@pytest.mark.parametrize("model_type", ["llama", "ministral"])
def test_a_batch_with_padding(model_type, make_toy, compress) -> None:
    rounded = compress(make_toy(model_type), KVCacheQuant(sink_tokens=0))  # else padding takes their place
    padded = torch.cat([torch.full((1, 4), 2), PROMPT[:1, 4:]], 1)
    mask = (padded != 2).long()
    both = generated(
        rounded, torch.cat([padded, PROMPT[1:]]), attention_mask=torch.cat([mask, torch.ones(1, 12).long()])
    )
    assert torch.equal(both[0, 12:], generated(rounded, PROMPT[:1, 4:])[0, 8:])
    assert torch.equal(both[1, 12:], generated(rounded, PROMPT[1:])[0, 12:])


def test_a_conversation_goes_on(rounded) -> None:
    first = generated(rounded, PROMPT, return_dict_in_generate=True)
    again = generated(rounded, torch.cat([first.sequences, TOKENS], 1), past_key_values=first.past_key_values)
    assert torch.equal(again, generated(rounded, torch.cat([first.sequences, TOKENS], 1)))


def test_a_cache_is_cropped_and_pickled(make_toy, compress) -> None:
    model = compress(make_toy(), KVCacheQuant())
    with torch.no_grad():
        past = model(torch.cat([PROMPT, TOKENS], 1), use_cache=True).past_key_values
        past.crop(-TOKENS.shape[1])
        past = pickle.loads(pickle.dumps(past))
        found = model(TOKENS[:, :1], past_key_values=past, use_cache=True).logits[:, -1]
    wanted = by_tokens(model, None)[:, 1]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2


def test_caches_that_hold_no_lines_get_rounded_numbers(make_toy, compress) -> None:
    model, plain = compress(make_toy(), KVCacheQuant(sink_tokens=14)), make_toy()
    with torch.no_grad():
        filled = plain(PROMPT, use_cache=True).past_key_values
        before = filled.layers[0].keys.clone()
        given = plain(torch.cat([PROMPT, TOKENS], 1), use_cache=True).past_key_values.layers[0].keys[:, :, 12:]
        model(TOKENS, past_key_values=filled, use_cache=True)
    keys = filled.layers[0].keys
    assert keys.dtype == torch.float32
    assert torch.equal(keys[:, :, :12], before)
    torch.testing.assert_close(keys[:, :, 12:14], given[:, :, :2], rtol=0, atol=1e-5)  # tokens 12 and 13 are sinks
    form = KVCacheFormat(KVCacheQuant().clip_ratio)
    block = model.model.layers[0]
    wanted = BlockRounding(form, (block.key_mean, block.value_mean)).round((given, given), 0)[0]
    torch.testing.assert_close(keys[:, :, 14:], wanted[:, :, 2:], rtol=0, atol=1e-4)
    assert float((wanted - given).abs().max()) > 1e-2


@pytest.mark.parametrize("rounded", ["llama", "ministral", "phi3", "qwen3"], indirect=True)
def test_compiled_graphs(rounded) -> None:
    """Without a cache, and with a static one that was filled before, as `generate` fills it."""
    torch._dynamo.reset()
    whole = torch.cat([PROMPT, TOKENS], 1)
    compiled = torch.compile(rounded.forward, fullgraph=True, backend="aot_eager")
    past, other = StaticCache(rounded.config, 24), StaticCache(rounded.config, 24)
    with torch.no_grad():
        wanted = rounded(whole, use_cache=False).logits
        found = compiled(whole, use_cache=False).logits
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2
        rounded(PROMPT, past_key_values=past, use_cache=True)
        step = compiled(TOKENS[:, :1], past_key_values=past, use_cache=True).logits[:, -1]
        in_graph = compiled(whole, past_key_values=other, use_cache=True).logits
    assert float((in_graph - wanted).norm() / wanted.norm()) < 2e-2
    assert other.layers[0].keys.dtype == torch.float32  # rounded; a graph cannot make lines of it
    assert past.layers[0].keys.dtype == torch.uint8
    assert float((step - wanted[:, 12]).norm() / wanted[:, 12].norm()) < 2e-2


def test_means_are_those_of_the_calibration_data(make_toy, compress, token_ids) -> None:
    model, plain = compress(make_toy(), KVCacheQuant()), make_toy()
    with torch.no_grad():
        past = plain(token_ids(), use_cache=True).past_key_values
    for block, layer in zip(model.model.layers, past.layers, strict=True):
        torch.testing.assert_close(block.key_mean, layer.keys[:, :, 1:].mean((0, 2)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block.value_mean, layer.values[:, :, 1:].mean((0, 2)), rtol=1e-4, atol=1e-5)


def test_padding_does_not_count_in_means(make_toy) -> None:
    decoder = Decoder(make_toy(), KNOWN["llama"])
    padded = torch.cat([torch.full((2, 3), 2), PROMPT], 1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    found = [each.means for each in cache_moments(decoder, [{"input_ids": padded, "attention_mask": mask}])]
    with torch.no_grad():
        layer = decoder.model(padded, attention_mask=mask, use_cache=True).past_key_values.layers[0]
    for mean, wanted in zip(found[0], (layer.keys, layer.values), strict=True):
        torch.testing.assert_close(mean.float(), wanted[:, :, 4:].mean((0, 2)), rtol=1e-4, atol=1e-5)


def test_an_unfilled_cache_of_another_class_is_left_as_it_is(make_toy, compress) -> None:
    class Own(DynamicCache):
        pass

    model = compress(make_toy(), KVCacheQuant())
    past = Own(config=model.config)
    past.layers[0].__class__ = type("OwnLayer", (type(past.layers[0]),), {})
    with torch.no_grad():
        model(PROMPT, past_key_values=past, use_cache=True)
    assert [layer.keys.dtype for layer in past.layers] == [torch.float32, torch.uint8]


@pytest.mark.parametrize("orthogonal", [True, False])
def test_the_split_compiles(orthogonal) -> None:
    torch._dynamo.reset()
    matrix = torch.linalg.qr(states(3, 16, 16)).Q
    matrix = matrix if orthogonal else matrix * torch.linspace(1, 2, 16)
    basis = Basis(matrix, None if orthogonal else torch.linalg.inv(matrix))
    rounding = BlockRounding(KVCacheFormat(0.9, key_rank=4, value_rank=2), None, (basis, None))
    compiled = torch.compile(rounding.round, fullgraph=True, backend="aot_eager")
    given = states(2, 3, 5, 16), states(2, 3, 5, 16, seed=1)
    for found, wanted in zip(compiled(given, 0), rounding.round(given, 0), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_coordinates_in_eight_bits(dtype) -> None:
    """Vectors whose energy is in four directions of a basis: these have 8 bits, and the others a finer grid."""
    basis = Basis(torch.linalg.qr(states(3, 24, 24)).Q.to(dtype))
    x = (states(2, 3, 7, 24) * torch.tensor([20.0] * 4 + [1.0] * 20) @ basis.matrix.float().mT).to(dtype)
    form = KVCacheFormat(0.9)
    lines = pack_states(x, form, 4, basis)
    assert lines.shape == (2, 3, 7, 20 // 2 + 4 + 4 * dtype.itemsize)
    assert torch.equal(pack_states(x[:, :, 2:], form, 4, basis), lines[:, :, 2:])
    found = unpack_states(lines, form, dtype, 4, basis)
    assert found.dtype == dtype
    error, plain = (float((each.float() - x.float()).norm()) for each in (found, rounded_states(x, form)))
    assert error < 0.2 * plain
    # Without a basis the first coordinates are those of the vector, in whatever layout 8 bits need.
    y = torch.tensor([[0.0, 255.0, 15.0, 7.2, 1.0, 0.0]])
    assert torch.equal(unpack_states(pack_states(y, KVCacheFormat(), 2), KVCacheFormat(), torch.float32, 2), y.round())


@pytest.mark.parametrize("center", [True, False])
def test_bases_are_those_of_the_calibration_data(center, make_toy, compress, token_ids) -> None:
    model, plain = compress(make_toy(), KVCacheQuant(high_rank=4, high_bits=8, center=center)), make_toy()
    with torch.no_grad():
        past = plain(token_ids(), use_cache=True).past_key_values
    for block, layer in zip(model.model.layers, past.layers, strict=True):
        for basis, part in ((block.key_basis, layer.keys), (block.value_basis, layer.values)):
            heads, size = part.shape[1], part.shape[3]
            x = part[:, :, 1:].transpose(0, 1).reshape(heads, -1, size)
            x = x - x.mean(1, keepdim=True) if center else x
            moments = basis.mT @ (x.mT @ x / x.shape[1]) @ basis
            torch.testing.assert_close(basis @ basis.mT, torch.eye(size).expand_as(basis), rtol=0, atol=1e-5)
            high, low, mixed = moments[:, :4, :4], moments[:, 4:, 4:], moments[:, :4, 4:]
            largest = torch.linalg.eigvalsh(low)[:, -1]
            assert (torch.linalg.eigvalsh(high)[:, 0] >= 0.999 * largest).all()
            assert float(mixed.abs().max()) < 1e-3 * float(largest.max())
            assert float((low - torch.diag_embed(low.diagonal(dim1=1, dim2=2))).abs().max()) > 0.01  # rotated


@torch.no_grad()
def attended(model: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries and keys that the attention of a model of one block gets, `[batch, heads, positions, size]` each."""
    seen = []

    def watched(module, query, key, *rest, **others):
        seen.append((query, key))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *rest, **others)

    ALL_ATTENTION_FUNCTIONS["watched"] = watched
    model.config._attn_implementation = "watched"
    model(ids, use_cache=False, **options)
    del ALL_ATTENTION_FUNCTIONS["watched"]
    (found,) = seen
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_moments_of_queries_are_those_of_what_reads_the_keys(attention, make_toy, token_ids) -> None:
    model, ids = make_toy("qwen3", num_hidden_layers=1), token_ids()
    model.set_attn_implementation(attention)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    (found,) = cache_moments(Decoder(model, KNOWN["qwen3"]), [{"input_ids": ids, "attention_mask": padded}], True, True)
    assert model.config._attn_implementation == attention
    query, _ = attended(model, ids, attention_mask=padded)
    counted = (padded.cumsum(1) > 1) & (padded > 0)
    heads = model.config.num_key_value_heads
    rows = query.transpose(1, 2)[counted].double().unflatten(1, (heads, -1))  # [tokens, heads, group, size]
    wanted = torch.einsum("tngd,tnge->nde", rows, rows) / rows.shape[0] / rows.shape[2]
    torch.testing.assert_close(found.queries, wanted, rtol=1e-4, atol=1e-6)


def test_means_that_are_large_against_the_rest(make_toy, compress, token_ids) -> None:
    """In bfloat16 the mean that is taken off is not the mean, and the second moment about it is another."""

    def biased() -> Any:
        model = make_toy("qwen2", num_hidden_layers=1, dtype=torch.bfloat16)
        bias = model.model.layers[0].self_attn.k_proj.bias
        bias.data = 300 * states(*bias.shape, seed=3, dtype=torch.bfloat16)
        return model

    block = compress(biased(), KVCacheQuant(key_basis="balanced")).model.layers[0]
    _, keys = attended(biased(), token_ids())
    x = (keys.float() - block.key_mean.float().unsqueeze(1))[:, :, 1:]
    found = x @ block.key_basis.float() @ block.key_inverse.float()
    assert float((found - x).norm() / x.norm()) < 0.02


@pytest.mark.parametrize("rank", [0, 2], ids=["all in 4 bits", "some in 8"])
def test_balanced_keys_spoil_scores_less(rank, make_toy, compress) -> None:
    """Queries that ask in a few directions: the others may be rounded more coarsely."""

    def lopsided() -> Any:
        model = make_toy(num_hidden_layers=1)
        attention = model.model.layers[0].self_attn
        size = attention.head_dim
        few = torch.linspace(0, 1, size // 2).repeat(2)[:, None] ** 6 + 0.01  # pairs that turn together
        for linear in (attention.q_proj, attention.k_proj):
            factor = few if linear is attention.q_proj else 1 / (few + 0.1)
            linear.weight.data *= factor.repeat(linear.out_features // size, 1)
        return model

    def scores(model: Any) -> torch.Tensor:
        query, key = attended(model, PROMPT)
        return query.unflatten(1, (key.shape[1], -1)) @ key.mT.unsqueeze(2)

    exact, errors = scores(lopsided()), []
    high = {"high_rank": rank, "high_bits": 8, "high_states": ["keys"]} if rank else {}
    for basis in ("energy", "balanced"):
        model = compress(lopsided(), KVCacheQuant(key_basis=basis, **high))
        errors.append(float((scores(model) - exact).norm() / exact.norm()))
    print(errors)
    assert 1e-4 < errors[1] < 0.7 * errors[0]


def test_values_that_the_projection_has_split_need_no_basis(make_toy, compress) -> None:
    projection = {"rank": 8, "o_proj_rank_per_head": "1/8", "values_basis": "values", "online_rotation": []}
    for values, rank, folded in (
        (("keys", "values"), "1/8", True),
        (("keys", "values"), 4, False),
        (("keys",), 2, True),
    ):
        cache = KVCacheQuant(high_rank=rank, high_bits=8, high_states=list(values))
        model = compress(make_toy(), SVDOutlierProjection(**projection), cache)
        block = model.model.layers[0]
        assert hasattr(block, "key_basis")
        assert hasattr(block, "value_basis") != folded
        found, wanted = by_tokens(model), at_once(model)
        assert float((found - wanted).norm() / wanted.norm()) < 2e-2
        exact = at_once(make_toy())
        assert float((wanted - exact).norm() / exact.norm()) < 0.1


def test_a_share_is_an_even_number(make_toy, compress) -> None:
    model = compress(make_toy("qwen3"), KVCacheQuant(**SPLIT))  # heads of 24
    with torch.no_grad():
        layer = model(PROMPT, use_cache=True).past_key_values.layers[0]
    assert layer.keys.shape[-1] == (24 + 4) // 2 + 16  # 3 made even


def test_refusals_of_coordinates_in_eight_bits(make_toy, compress) -> None:
    for given in ({"high_rank": 2}, {"high_bits": 8}):
        with pytest.raises(ValueError, match=r"high_rank .* and high_bits .* go together"):
            KVCacheQuant(**given)
    for given in ({"high_rank": 2, "high_bits": 4}, {"bits": 8}, {"high_rank": 2, "high_bits": 8, "high_states": []}):
        with pytest.raises(ValueError, match=r"high_bits|bits|high_states"):
            KVCacheQuant(**given)
    for rank in (16, 3, "1/32", "1/1"):
        with pytest.raises(ValueError, match=r"high_rank comes to \d+ of the 16 coordinates of a head"):
            compress(make_toy(), KVCacheQuant(high_rank=rank, high_bits=8))


def test_attention_that_shows_no_queries_is_refused_before_the_work(make_toy, compress) -> None:
    model = make_toy()
    attention = model.model.layers[1].self_attn
    attention.__class__ = type("Own", (type(attention),), {"__module__": __name__})  # which has no attention function
    with pytest.raises(
        ValueError, match=r"'balanced' weighs queries, and model\.layers\.1 computes.*key_basis: energy"
    ):
        compress(model, KVCacheQuant(key_basis="balanced"))
    compress(model, KVCacheQuant())


def test_refusals(make_toy, compress) -> None:
    twice = validate_modifiers([KVCacheQuant(), KVCacheQuant()])
    assert "the recipe has another KVCacheQuant" in str(twice[0])
    for late in (SVDOutlierProjection(), DynamicActQuant(), OutlierSplitGPTQ(bits=4)):
        early = validate_modifiers([KVCacheQuant(), late])
        assert f"{type(late).__name__} comes after KVCacheQuant" in str(early[0])
    assert validate_modifiers([KVCacheQuant()]) == []
    with pytest.raises(ValueError, match="the heads have 7"):
        compress(make_toy(hidden_size=28, num_attention_heads=4, num_key_value_heads=2, head_dim=7), KVCacheQuant())
