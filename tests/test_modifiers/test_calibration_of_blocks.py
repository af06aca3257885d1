"""Running a model block by block: same activations, and only real tokens count."""

from __future__ import annotations

import pytest
import torch

from quad_modifiers.model.architecture import BUILTIN_ARCHITECTURES, Architecture, Group, dense_block
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.passes import calibration_stream as stream_module
from quad_modifiers.passes.calibration_stream import first_block_inputs
from quad_modifiers.passes.runners import HookedRunner, SegmentedRunner
from quad_modifiers.passes.statistics import collect_statistics


@pytest.fixture(autouse=True)
def float32_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments in bfloat16, where that is fast, could only be compared loosely."""
    monkeypatch.setattr(stream_module, "fast_dtype", lambda device: torch.float32)


KNOWN = {architecture.model_type: architecture for architecture in BUILTIN_ARCHITECTURES}


def decoder_of(model) -> Decoder:
    return Decoder(model, KNOWN[model.config.model_type])


def batches_of(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row.unsqueeze(0)} for row in ids]


@torch.no_grad()
def states_of(model, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Residual stream before each block and behind the last."""
    states, hooks = [], []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_hook(lambda _, args, out: states.append(out)))
    first = model.model.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model(ids, attention_mask=mask, use_cache=False)
    for hook in (*hooks, first):
        hook.remove()
    return states


@pytest.mark.parametrize("runner", [SegmentedRunner, HookedRunner])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("arcee", {}),
        ("phi3", {}),
        pytest.param("granite", {}, id="granite, whose branches have a factor"),
        pytest.param("smollm3", {"no_rope_layers": [1, 0, 1]}, id="smollm3, a layer of which has no positions"),
        pytest.param(
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
            id="qwen2 with full and sliding layers",
        ),
    ],
)
def test_runners_equal_the_layers_own_forward(model_type, overrides, padded, runner, make_toy, token_ids) -> None:
    model = make_toy(model_type, num_hidden_layers=3, **overrides)
    ids = token_ids(2, 20)
    mask = None
    batch = {"input_ids": ids}
    if padded:
        mask = torch.ones_like(ids)
        mask[1, 13:] = 0
        batch["attention_mask"] = mask
    wanted = states_of(model, ids, mask)
    decoder = decoder_of(model)
    (stream,) = first_block_inputs(decoder, [batch])
    torch.testing.assert_close(stream.hidden, wanted[0])
    hidden = stream.hidden
    with torch.no_grad():
        for index, block in enumerate(decoder.blocks):
            hidden = runner(block).run(hidden, stream.arguments[index], lambda group, x: None)
            torch.testing.assert_close(
                stream.tokens(hidden), stream.tokens(wanted[index + 1]), rtol=1e-4, atol=1e-4, msg=f"layer {index}"
            )


@pytest.mark.parametrize("runner", [SegmentedRunner, HookedRunner])
def test_inputs_are_those_of_the_linears(runner, make_toy, token_ids) -> None:
    model = make_toy("qwen3")
    layer = model.model.layers[0]
    wanted, entered = {}, []
    for key, module in {
        "qkv": layer.self_attn.q_proj,
        "o": layer.self_attn.o_proj,
        "gate_up": layer.mlp.up_proj,
        "down": layer.mlp.down_proj,
    }.items():
        module.register_forward_pre_hook(lambda _, args, key=key: wanted.update({key: args[0]}))
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    decoder, got, streams = decoder_of(model), {}, {}
    (stream,) = first_block_inputs(decoder, [{"input_ids": token_ids(2, 20)}])
    with torch.no_grad():
        model(token_ids(2, 20))
        expected, norms = dict(wanted), list(entered)
        runner(decoder.blocks[0]).run(
            stream.hidden,
            stream.arguments[0],
            lambda group, x: got.update({group.group.name: x}),
            lambda group, x: streams.update({group.group.name: x}),
        )
    assert list(got) == ["qkv", "o", "gate_up", "down"]
    assert list(streams) == ["qkv", "gate_up"]
    for key, tensor in expected.items():
        torch.testing.assert_close(got[key], tensor, rtol=1e-4, atol=1e-4)
    for found, tensor in zip(streams.values(), norms, strict=True):
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runner", [SegmentedRunner, HookedRunner])
def test_a_visit_moves_the_stream_past_the_changed_block(runner, make_toy, token_ids) -> None:
    model = make_toy("llama")
    decoder = decoder_of(model)
    texts = [token_ids(1, 20), token_ids(1, 13)]
    stream = first_block_inputs(decoder, [{"input_ids": text} for text in texts])
    visited = []

    def visit(group, inputs) -> None:
        visited.append(group.group.name)
        assert [x.shape[-1] for x in inputs] == [group.linears[0].module.in_features] * 2
        group.linears[0].module.weight.data *= 0.5

    with torch.no_grad():
        runner(decoder.blocks[0]).visit(stream, visit)
        wanted = [states_of(model, text)[1] for text in texts]  # of the changed model
    assert visited == ["qkv", "o", "gate_up", "down"]
    torch.testing.assert_close([batch.hidden for batch in stream], wanted, rtol=1e-4, atol=1e-4)


def test_neighbours_of_one_length_become_one_batch(make_toy, token_ids) -> None:
    ids, short = token_ids(5, 600), token_ids(1, 13)
    masked = torch.ones_like(short)
    masked[0, 9:] = 0
    batches = [
        *batches_of(ids),
        {"input_ids": short, "attention_mask": torch.ones_like(short)},
        {"input_ids": short, "attention_mask": masked},
        {"input_ids": short},
    ]
    stream = first_block_inputs(decoder_of(make_toy("llama")), batches)
    # 2048 tokens at most, nothing padded to another length, and padding stays where it was
    assert [tuple(batch.hidden.shape[:2]) for batch in stream] == [(3, 600), (2, 600), (1, 13), (1, 13), (1, 13)]
    assert [batch.keep is not None for batch in stream] == [False, False, False, True, False]


def test_a_block_without_pairs_needs_the_hooked_runner(make_toy) -> None:
    reader, *_, last = dense_block()
    architecture = Architecture("llama", (reader, last, Group("r", "mlp", (), "channels")))
    decoder = Decoder(make_toy("llama"), architecture)
    with pytest.raises(ValueError, match=r'groups qkv, down, r, which are not pairs .* runner="hooked"'):
        SegmentedRunner(decoder.blocks[0])


def assert_same_statistics(left, right) -> None:
    torch.testing.assert_close(left.residual, right.residual, rtol=1e-4, atol=1e-4)
    for mine, other in ((left.heads, right.heads), (left.channels, right.channels)):
        assert list(mine) == list(other)
        for path in mine:
            torch.testing.assert_close(mine[path], other[path], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(side, make_toy, token_ids) -> None:
    model = make_toy("llama")
    ids = token_ids(4, 24)
    lengths = (24, 7, 16, 1)
    padded, mask = torch.full_like(ids, 2), torch.zeros_like(ids)
    unpadded = []
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(24 - length, 24)
        padded[row, place] = ids[row, :length]
        mask[row, place] = 1
        unpadded.append({"input_ids": ids[row : row + 1, :length]})
    decoder = decoder_of(model)
    together = collect_statistics(decoder, [{"input_ids": padded, "attention_mask": mask}])
    alone = collect_statistics(decoder, unpadded)
    assert_same_statistics(together, alone)
    counted = collect_statistics(decoder, [{"input_ids": padded}])
    assert not torch.allclose(counted.residual, alone.residual, rtol=1e-2), "the padding would show if it counted"


def test_batching_does_not_count(make_toy, token_ids) -> None:
    model = make_toy("qwen2", "odd")
    decoder = decoder_of(model)
    ids = token_ids(6, 16)
    one = collect_statistics(decoder, [{"input_ids": ids}])
    uneven = [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}]
    assert_same_statistics(collect_statistics(decoder, uneven), one)


def test_residual_statistics_are_those_of_the_normalized_stream(make_toy, token_ids) -> None:
    model = make_toy("llama", num_hidden_layers=1)
    layer, ids = model.model.layers[0], token_ids(3, 16)
    seen = []
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double().flatten(0, 1)))
    statistics = collect_statistics(decoder_of(model), batches_of(ids))
    seen.clear()
    with torch.no_grad():
        model(ids)
    normed = torch.cat([x / (x.square().mean(1, keepdim=True) + model.config.rms_norm_eps).sqrt() for x in seen])
    torch.testing.assert_close(statistics.residual, normed.T @ normed / len(normed), rtol=1e-4, atol=1e-4)
    # Normalized inputs have mean square one: the trace is the width.
    assert float(statistics.residual.trace()) == pytest.approx(64, rel=1e-2)


def test_block_goes_back_to_its_dtype(make_toy, token_ids) -> None:
    model = make_toy("llama", dtype=torch.bfloat16)
    collect_statistics(decoder_of(model), batches_of(token_ids(2, 8)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_overflow_in_the_last_block_is_noticed(make_toy, token_ids) -> None:
    """No later norm would see it."""
    model = make_toy("llama", num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1e20
        model.model.layers[1].mlp.gate_proj.weight *= 1e20
    with pytest.raises(ValueError, match="layer 1"):
        collect_statistics(decoder_of(model), batches_of(token_ids(2, 8)))
