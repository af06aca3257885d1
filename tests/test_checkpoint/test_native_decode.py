"""A token through all blocks in one native call: the blocks' numbers, the cache, and when it runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quad_kernels import choose_backend
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from quad_modifiers.nn import native_block
from quad_modifiers.nn.native_decode import NativeDecode
from tests.test_checkpoint.test_native_block import BRANCHES, TWO_LEVELS, Recorder, blocks

pytestmark = pytest.mark.skipif(choose_backend("cpu").name != "native", reason="there are no native kernels")

PROMPT = torch.tensor([[5, 17, 40, 8, 21, 30, 11], [90, 12, 77, 3, 9, 64, 7], [33, 45, 6, 8, 10, 99, 150]])


def step(model: PreTrainedModel, past: Any, tokens: torch.Tensor, **named: Any) -> tuple[torch.Tensor, list[str]]:
    """Logits (of a decoder hidden states) of one token of each sequence, and the native operators that ran."""
    with torch.no_grad(), Recorder() as recorder:
        output = model(tokens, past_key_values=past, use_cache=True, **named)[0]
    return output, [name for name in recorder.names if name != "plan_blocks"]  # once, at the first token


def filled(model: PreTrainedModel, prompt: torch.Tensor = PROMPT, **named: Any) -> DynamicCache:
    """The cache behind a prompt."""
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=past, use_cache=True, **named)
    return past


def attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **named: Any) -> Any:
    """An attention of transformers that computes as the native call does."""
    positions = key.shape[2]
    seen = None if mask is None else mask[:, 0, 0, :positions].contiguous()
    flat = query.transpose(1, 2).flatten(2)
    output = torch.ops.quad_native.attend(flat, key.contiguous(), value.contiguous(), positions, seen, named["scaling"])
    return output.unflatten(-1, (-1, key.shape[-1])), None


@pytest.fixture
def model(compressed) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(compressed.folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["llama", "ministral", "mistral", "qwen2", "qwen3", "two levels", "branches"])
def test_it_computes_what_the_blocks_compute(
    compress_toy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, model_type: str, dtype: torch.dtype
) -> None:
    windows: dict[str, Any] = {
        "mistral": {"sliding_window": None},
        "ministral": {"layer_types": ["full_attention"] * 2},  # transformers wants its window all the same
    }
    window = windows.get(model_type, {})
    recipes = {"two levels": {"recipe": TWO_LEVELS, "size": "even"}, "branches": {"recipe": BRANCHES}}
    of = recipes.get(model_type)
    made = compress_toy(model_type=model_type) if of is None else compress_toy(model_type="llama", **of)
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=dtype, **window)
    for padding in (0, 3):
        mask = torch.ones(3, 7, dtype=torch.long)
        mask[1, :padding] = 0
        past = filled(model, attention_mask=mask)
        others = copy.deepcopy(past)
        monkeypatch.setattr(native_block, "attention_function", lambda attention: attend)
        for i in range(4):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
            tokens = torch.tensor([[7 + i], [20 + i], [90 + i]])
            own, names = step(model, past, tokens, attention_mask=mask)
            assert names[:2] == ["decode", "norm"]
            forward = model.model.__dict__.pop("forward")
            wanted, names = step(model, others, tokens, attention_mask=mask)
            model.model.forward = forward
            assert names.count("block_in") == len(blocks(model))
            assert torch.equal(own, wanted)
        monkeypatch.undo()
        for own_layer, layer in zip(past.layers, others.layers, strict=True):
            assert torch.equal(own_layer.keys, layer.keys)
            assert torch.equal(own_layer.values, layer.values)
    assert not torch.equal(mask, torch.ones_like(mask))


@pytest.mark.parametrize(
    ("dtype", "recipe"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, {"recipe": BRANCHES})],
    ids=["torch.float32", "torch.bfloat16", "branches"],
)
def test_the_number_of_threads_changes_nothing(
    compress_toy: Callable[..., Any], dtype: torch.dtype, recipe: dict[str, str]
) -> None:
    """Large enough for a team of three, its parts uneven; two parts of positions; with and without a team."""
    sizes = {"hidden_size": 288, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 1280}
    model = AutoModelForCausalLM.from_pretrained(compress_toy(**recipe, **sizes).folder, dtype=dtype)
    decoder = model.model  # the head's product is PyTorch's
    prompt = torch.arange(6 * 270).view(6, 270) % 290 + 3
    before = torch.get_num_threads()
    try:
        for batch in (1, 3, 6):
            past, seen = filled(model, prompt[:batch]), []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                own = copy.deepcopy(past)
                states = [step(decoder, own, prompt[:batch, i : i + 1]) for i in range(3)]
                assert all(names[0] == "decode" for _, names in states)
                seen.append(torch.cat([each for each, _ in states]))
            assert all(torch.equal(seen[0], other) for other in seen[1:])
    finally:
        torch.set_num_threads(before)


def test_weights_whose_data_were_exchanged_are_read_anew(model) -> None:
    past = filled(model)
    first, _ = step(model, copy.deepcopy(past), PROMPT[:, :1])
    weight = model.model.layers[0].self_attn.q_proj.outlier.weight
    old = weight.data
    weight.data = old * 3
    changed, names = step(model, copy.deepcopy(past), PROMPT[:, :1])
    assert names[0] == "decode"
    assert not torch.equal(first, changed)
    weight.data = old
    assert torch.equal(step(model, past, PROMPT[:, :1])[0], first)


def test_static_caches_give_the_same(model) -> None:
    dynamic, static = filled(model), StaticCache(config=model.config, max_cache_len=10)
    with torch.no_grad():
        model(PROMPT, past_key_values=static, use_cache=True)
    for i in range(3):
        own, names = step(model, static, PROMPT[:, i : i + 1])
        assert names[0] == "decode"
        assert torch.equal(own, step(model, dynamic, PROMPT[:, i : i + 1])[0])
        assert int(static.layers[0].get_seq_length()) == 8 + i
    with pytest.raises((RuntimeError, IndexError)):  # it is full
        step(model, static, PROMPT[:, :1])


def test_a_cache_can_be_cropped_copied_kept_and_reordered(model) -> None:
    past = filled(model)
    first, _ = step(model, past, PROMPT[:, :1])
    kept = [layer.keys for layer in past.layers], [layer.keys.clone() for layer in past.layers]
    twin, shallow = copy.deepcopy(past), copy.copy(past)
    shallow.layers = [copy.copy(layer) for layer in past.layers]
    second, names = step(model, past, PROMPT[:, 1:2])
    assert names[0] == "decode"
    for other in (twin, shallow):  # each goes its own way from the same point
        step(model, other, PROMPT[:, 3:4])
    third, _ = step(model, past, PROMPT[:, 2:3])
    for other in (twin, shallow):
        other.crop(-1)
        assert torch.equal(step(model, other, PROMPT[:, 1:2])[0], second)
    past.crop(-3)
    assert all(map(torch.equal, *kept))
    assert torch.equal(step(model, past, PROMPT[:, :1])[0], first)
    assert torch.equal(step(model, past, PROMPT[:, 1:2])[0], second)
    order = torch.tensor([2, 0, 1])
    past.reorder_cache(order)
    assert torch.equal(step(model, past, PROMPT[order, 2:3])[0], third[order])


def test_a_cache_grows_beyond_its_room(model) -> None:
    past, tokens = filled(model, PROMPT[:1]), torch.arange(3, 303) % 290 + 3
    for token in tokens:
        logits, names = step(model, past, token.view(1, 1))
        assert names[0] == "decode"
    whole = filled(model, PROMPT[:1])
    with torch.no_grad():
        wanted = model(tokens[None], past_key_values=whole, use_cache=True).logits[:, -1:]
    assert past.get_seq_length() == whole.get_seq_length() == 307
    torch.testing.assert_close(past.layers[0].values, whole.layers[0].values, rtol=1e-4, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(logits, wanted, dim=-1) > 0.99


def changed(model: PreTrainedModel, how: str) -> None:
    layer = model.model.layers[-1]
    if how == "hook of a block":
        layer.register_forward_hook(lambda module, args, output: None)
    elif how == "hook of a linear":
        layer.mlp.up_proj.register_forward_pre_hook(lambda module, args: None)
    elif how == "another linear":
        layer.self_attn.k_proj = torch.nn.Linear(
            layer.self_attn.k_proj.in_features, layer.self_attn.k_proj.out_features
        )
    elif how == "another attention":
        AttentionInterface.register("own", lambda *args, **named: sdpa_attention_forward(*args, **named))
        model.config._attn_implementation = "own"
    elif how == "training":
        model.train()


@pytest.mark.parametrize(
    "how", ["hook of a block", "hook of a linear", "another linear", "another attention", "training"]
)
def test_what_it_cannot_do_runs_as_before(model, how: str) -> None:
    past = filled(model)
    assert step(model, past, PROMPT[:, :1])[1][0] == "decode"
    changed(model, how)
    assert "decode" not in step(model, past, PROMPT[:, 1:2])[1]
    assert past.get_seq_length() == 9


def test_hooks_that_come_and_go_are_heard(model) -> None:
    past, heard = filled(model), []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: heard.append(output.shape))
    step(model, past, PROMPT[:, :1])
    hook.remove()
    _, names = step(model, past, PROMPT[:, 1:2])
    assert len(heard) == 1
    assert names[0] == "decode"


def test_outputs_of_the_blocks_are_captured_and_then_it_runs_again(model) -> None:
    past = filled(model)
    with torch.no_grad():
        output = model(PROMPT[:, :1], past_key_values=past, use_cache=True, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert step(model, past, PROMPT[:, 1:2])[1][0] == "decode"
    assert step(model, past, PROMPT[:, 1:3])[1].count("block_in") == 2


@pytest.mark.parametrize("what", ["scale", "outlier", "norm", "data"])
def test_a_changed_weight_is_seen_at_once(model, what: str) -> None:
    past = filled(model)
    twin = copy.deepcopy(past)
    before, _ = step(model, past, PROMPT[:, :1])
    layer = model.model.layers[1]
    with torch.no_grad():
        if what == "scale":
            layer.mlp.down_proj.residual.weight_scale.mul_(2)
        elif what == "outlier":
            layer.mlp.down_proj.outlier.weight = torch.nn.Parameter(layer.mlp.down_proj.outlier.weight + 1, False)
        elif what == "norm":
            layer.input_layernorm.weight.mul_(2)
        else:
            layer.post_attention_layernorm.weight.data = layer.post_attention_layernorm.weight.data * 2
    after, names = step(model, twin, PROMPT[:, :1])
    assert names[0] == "decode"
    assert not torch.equal(before, after)


def test_a_sliding_window_stays_with_the_blocks(compress_toy: Callable[..., Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(compress_toy(model_type="mistral").folder, sliding_window=4)
    past = filled(model)
    assert "decode" not in step(model, past, PROMPT[:, :1])[1]


def test_masks_that_it_does_not_know_stay_with_the_blocks(model) -> None:
    additive = torch.zeros(3, 1, 1, 8)
    assert "decode" not in step(model, filled(model), PROMPT[:, :1], attention_mask=additive)[1]
    boolean = torch.ones(3, 1, 1, 8, dtype=torch.bool)
    assert step(model, filled(model), PROMPT[:, :1], attention_mask=boolean)[1][0] == "decode"


def test_the_embedding_is_called_once_and_two_inputs_are_an_error(model) -> None:
    past, calls = filled(model), []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: calls.append(output))
    step(model, past, PROMPT[:, :1])
    assert len(calls) == 1
    additive = torch.zeros(3, 1, 1, 9)
    assert "decode" not in step(model, past, PROMPT[:, :1], attention_mask=additive)[1]
    assert len(calls) == 2
    with pytest.raises(ValueError, match="exactly one"):
        step(model, past, PROMPT[:, :1], inputs_embeds=calls[0])
    embedded = filled(model)
    with torch.no_grad(), Recorder() as recorder:
        own = model(inputs_embeds=calls[0], past_key_values=embedded, use_cache=True).logits
    assert recorder.names[0] == "decode"
    assert torch.equal(own, step(model, filled(model), PROMPT[:, :1])[0])


def test_a_cache_goes_from_inference_mode_to_no_grad_and_back(model) -> None:
    with torch.inference_mode():
        past = filled(model)
        step(model, past, PROMPT[:, :1])
    own, names = step(model, past, PROMPT[:, 1:2])
    assert names[0] == "decode"
    wanted = filled(model)
    step(model, wanted, PROMPT[:, :1])
    with torch.inference_mode():
        assert torch.equal(step(model, wanted, PROMPT[:, 1:2])[0], own)


def test_a_cache_of_another_dtype_or_batch_is_not_written_into(model) -> None:
    past = filled(model)
    step(model, past, PROMPT[:, :1])
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError):  # as stock attention says: queries and keys of two dtypes
        step(model, past, PROMPT[:, 1:2])
    model.to(torch.float32)
    past = filled(model)
    step(model, past, PROMPT[:, :1])
    with pytest.raises(RuntimeError):
        step(model, past, PROMPT[:2, 1:2])
    assert past.layers[0].keys.shape[:3] == (3, past.layers[0].keys.shape[1], 8)


def test_copies_and_pickles_decode(model) -> None:
    past = filled(model)
    wanted, _ = step(model, copy.deepcopy(past), PROMPT[:, :1])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.model.forward, NativeDecode)
        assert other.model.forward.model is other.model
        logits, names = step(other, copy.deepcopy(past), PROMPT[:, :1])
        assert names[0] == "decode"
        assert torch.equal(logits, wanted)


def test_a_dequantized_model_has_the_forward_of_its_class(model) -> None:
    assert "forward" not in model.dequantize().model.__dict__


def test_a_compressed_model_in_memory_decodes_as_its_checkpoint(compress_toy: Callable[..., Any]) -> None:
    compressed = compress_toy()
    loaded = AutoModelForCausalLM.from_pretrained(compressed.folder)
    own, names = step(compressed.model, filled(compressed.model), PROMPT[:, :1])
    wanted, _ = step(loaded, filled(loaded), PROMPT[:, :1])
    assert names[0] == "decode"
    assert torch.equal(own, wanted)


def test_a_compiled_graph_decodes_with_one_operator_and_the_same_bits(model) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model.forward, backend=backend, fullgraph=True)
    caches = [StaticCache(config=model.config, max_cache_len=12) for _ in range(2)]
    padding = torch.ones(3, 1, 1, 12, dtype=torch.bool)
    padding[1, ..., :2] = False
    with torch.no_grad():
        for past in caches:
            model(PROMPT, past_key_values=past, use_cache=True)
        for i, mask in enumerate([None, None, padding]):
            token, place = PROMPT[:, i : i + 1], {"attention_mask": mask, "use_cache": True}
            own = compiled(token, past_key_values=caches[0], **place).logits
            with Recorder() as recorder:
                wanted = model(token, past_key_values=caches[1], **place).logits
            assert recorder.names[0] == "decode"
            assert torch.equal(own, wanted)
    assert int(caches[0].layers[1].cumulative_length) == 10
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert names.count("quad_modifiers.decode") + names.count("quad_modifiers.decode.default") == 1
    assert not [name for name in names if "block_in" in name]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_compiled_token_hears_what_came_after_its_graph(compressed, implementation: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed.folder, attn_implementation=implementation)
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    past = StaticCache(config=model.config, max_cache_len=12)
    padding = torch.ones(3, 1, 1, 12, dtype=torch.bool)
    padding[1, ..., :2] = False
    with torch.no_grad():
        model(PROMPT, past_key_values=past, use_cache=True)
        compiled(PROMPT[:, :1], past_key_values=past, attention_mask=padding, use_cache=True)
        eager, heard = copy.deepcopy(past), []
        hook = model.model.layers[1].mlp.register_forward_hook(
            lambda module, args, output: heard.append(output) or output * 2
        )
        own = compiled(PROMPT[:, 1:2], past_key_values=past, attention_mask=padding, use_cache=True).logits
        assert len(heard) == 1
        mask = torch.tensor([[1] * 9, [0, 0] + [1] * 7, [1] * 9])
        wanted = model(PROMPT[:, 1:2], past_key_values=eager, attention_mask=mask, use_cache=True).logits
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)
        for own_layer, layer in zip(past.layers, eager.layers, strict=True):
            torch.testing.assert_close(own_layer.keys, layer.keys, rtol=1e-4, atol=1e-5)
            assert int(own_layer.cumulative_length) == 9
        hook.remove()
        compiled(PROMPT[:, 2:3], past_key_values=past, attention_mask=padding, use_cache=True)
        assert len(heard) == 2  # the second was the eager model's
