"""The map between the streams of a checkpoint and its original, and the errors of blocks that it makes comparable."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.tools.inspection.measure.stream import StreamMap, measure_blocks
from quad_modifiers.tools.inspection.measuring import project, projection_of

LLAMA = Architecture("llama")


def decoder(model) -> Decoder:
    return Decoder(model, LLAMA)


@pytest.fixture
def projected(make_toy, windows, recipe_file):
    pytest.importorskip("llmcompressor")
    model = make_toy("llama")
    from quad_modifiers.modifiers.base import prepared_decoder  # imports llm-compressor

    project(prepared_decoder(model), projection_of(str(recipe_file), None), windows)
    return model


def test_map_of_a_projection(make_toy, projected) -> None:
    found = StreamMap.fit(decoder(make_toy("llama")), decoder(projected))
    assert found.there.shape == (64, 72)
    gain = 72 / 64
    torch.testing.assert_close(found.there @ found.there.T, gain * torch.eye(64), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.there @ found.back, torch.eye(64), rtol=1e-3, atol=1e-3)


def test_a_projection_alone_has_no_error(make_toy, projected, windows) -> None:
    for row in measure_blocks(decoder(make_toy("llama")), decoder(projected), windows[:2]):
        assert max(row.accumulated, row.alone, row.alone_weights) < 1e-6


def test_a_checkpoint_has(make_toy, make_checkpoint, windows) -> None:
    four, eight = (
        measure_blocks(
            decoder(make_toy("llama")), decoder(AutoModelForCausalLM.from_pretrained(make_checkpoint(bits))), windows
        )
        for bits in (4, 8)
    )
    for row in four:
        assert 1e-4 < row.alone_weights < row.alone < 1
        assert row.accumulated > 1e-4
    assert four[0].alone > eight[0].alone
    assert four[0].alone_weights == pytest.approx(eight[0].alone_weights, rel=0.5)


def test_another_model_is_refused(make_toy, projected, windows) -> None:
    with pytest.raises(ValueError, match=r"no change of basis .* made of another model"):
        measure_blocks(decoder(make_toy("llama", seed=1)), decoder(projected), windows)
    with pytest.raises(ValueError, match="has 3 blocks, the checkpoint 2"):
        measure_blocks(decoder(make_toy("llama", num_hidden_layers=3)), decoder(projected), windows)
    with pytest.raises(ValueError, match="embeds 330 tokens, the checkpoint 320"):
        measure_blocks(decoder(make_toy("llama", vocab_size=330)), decoder(projected), windows)
