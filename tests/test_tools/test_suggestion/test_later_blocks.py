"""What runs from a block on says what whole runs say, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from quad_kernels import InputQuantization

from quad_modifiers.model.architecture import find_architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.plugins import architectures
from quad_modifiers.tools.inspection.measure.loss import tried
from quad_modifiers.tools.inspection.measure.trials import Trial
from quad_modifiers.tools.suggestion.later_blocks import LaterBlocks


@torch.no_grad()
def distributions(model: torch.nn.Module, windows: list[torch.Tensor]) -> torch.Tensor:
    """Logarithms of the probabilities of the next token, `[windows, tokens, vocabulary]`."""
    return torch.cat([model(window).logits for window in windows]).double().log_softmax(-1)


@pytest.mark.parametrize("model_type", ["llama", "granite", "cwm"])
def test_they_agree_with_whole_runs(model_type: str, make_toy) -> None:
    layers = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]} if model_type == "cwm" else {}
    model = make_toy(model_type, num_hidden_layers=3, **layers)
    decoder = Decoder(model, find_architecture(model.config, architectures()))
    for linear in decoder.linears():
        linear.replace(QuadLinear(linear.module, linear.role))
    windows = [torch.randint(3, 320, (1, 24), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    runs, before = LaterBlocks(decoder, windows, (0, 1, 2)), distributions(model, windows)
    for start in (0, 1, 2):
        modules = [linear.module for linear in decoder.linears() if linear.layer == start]
        trial = Trial("part", "inputs", "3", dict.fromkeys(modules, InputQuantization(3)))
        with tried(trial):
            found, after = runs.divergence(start), distributions(model, windows)
        wanted = (before.exp() * (before - after)).sum(-1).mean()
        assert found == pytest.approx(wanted.item(), rel=1e-3)
        assert found > 1e-4
        assert runs.divergence(start) == 0.0
    assert not any("forward" in vars(block.module) for block in decoder.blocks)
