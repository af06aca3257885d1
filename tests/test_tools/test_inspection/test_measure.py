"""The numbers of an inspection, each against a computation of its own or a property that it must have."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from quad_kernels import InputQuantization, RMSNorm, fake_quantize

from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.quantization.grid_step import grid_step_ratio
from quad_modifiers.tools.evaluation import perplexity
from quad_modifiers.tools.inspection.measure import trials
from quad_modifiers.tools.inspection.measure.inputs import measure_inputs, measure_surfaces
from quad_modifiers.tools.inspection.measure.loss import LossMeter, Reference
from quad_modifiers.tools.inspection.measure.results import LossRow, write_json
from quad_modifiers.tools.inspection.measure.spectrum import candidate_ranks, errors_by_rank, measure_spectrum
from quad_modifiers.tools.inspection.measure.watch import INPUT_GRIDS
from quad_modifiers.tools.inspection.measure.weights import RoundedWeights, measure_weights

LLAMA = Architecture("llama")


def decoder(model) -> Decoder:
    return Decoder(model, LLAMA)


def wrapped(model):
    """The model with pass-through containers, as the modifiers make them."""
    for linear in decoder(model).linears():
        linear.replace(QuadLinear(linear.module, linear.role))
    return model


class TestSpectrum:
    def test_is_that_of_the_stream_before_both_norms(self, make_toy, windows) -> None:
        model = make_toy("llama")
        moment = torch.zeros(64, 64, dtype=torch.float64)

        def add(norm: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            stream = inputs[0].flatten(0, 1).double()
            stream = stream / (stream.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
            moment.add_(stream.T @ stream)

        norms = [
            norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        hooks = [norm.register_forward_pre_hook(add) for norm in norms]
        for window in windows:
            model(window)
        for hook in hooks:
            hook.remove()
        expected = torch.linalg.eigvalsh(moment).flip(0)
        found = measure_spectrum(decoder(model), windows, windows[0], 64, 8)
        torch.testing.assert_close(
            torch.tensor(found.energy), (expected / expected.sum()).float(), rtol=1e-3, atol=1e-6
        )
        assert found.tokens == 6 * 48 * 2 * 2  # windows, tokens, norms, blocks

    def test_energy_rises_to_one(self, make_toy, windows) -> None:
        found = measure_spectrum(decoder(make_toy("llama")), windows, windows[0], 64, 8)
        held = [found.held_by(rank) for rank in range(65)]
        assert held[0] == 0
        assert all(one <= other for one, other in pairwise(held))
        assert held[64] == pytest.approx(1, abs=1e-6)
        assert held[8] > 0.5, "the toy's planted directions hold most of the energy"

    def test_error_falls_with_rank_where_outliers_are(self) -> None:
        generator = torch.Generator().manual_seed(0)
        directions = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
        scale = torch.ones(64)
        scale[:4] = 30.0
        x = (torch.randn(2000, 64, generator=generator) * scale) @ directions.T
        errors = dict(errors_by_rank((x.T @ x).double(), x, [0, 4, 8]))
        assert errors[4] < 0.05 * errors[0]
        assert 0.6 * errors[4] < errors[8] < errors[4]

    def test_candidates(self) -> None:
        assert candidate_ranks(64, 8) == [0, 8, 16, 32]
        assert candidate_ranks(100, 10) == [0, 8, 10, 16, 32]


class TestInputs:
    def test_of_the_first_input(self, make_toy, windows) -> None:
        model = make_toy("llama")
        rows = measure_inputs(decoder(model), windows[:2], "before")
        assert [(row.layer, row.group) for row in rows[:5]] == [
            (0, "qkv"),
            (0, "o"),
            (0, "gate_up"),
            (0, "down"),
            (1, "qkv"),
        ]
        stream = model.model.embed_tokens(torch.cat(windows[:2])).flatten(0, 1)
        norm = model.model.layers[0].input_layernorm
        x = RMSNorm(norm.weight, norm.variance_epsilon)(stream).detach()
        for bits, found in ((4, rows[0].error_4bit), (8, rows[0].error_8bit)):
            error = (fake_quantize(x, INPUT_GRIDS[bits]) - x).square().sum(-1) / x.square().sum(-1)
            assert found == pytest.approx(error.mean().item(), rel=1e-4)
        step = x.abs().amax(-1) * 0.86 / 7.5
        assert rows[0].step_to_std == pytest.approx((step / x.std(-1)).mean().item(), rel=1e-4)
        assert rows[0].outlier_energy == 0

    def test_surface_keeps_every_peak(self, make_toy, windows) -> None:
        model = make_toy("llama")
        for surface in measure_surfaces(decoder(model), windows[0], [1], "before"):
            assert surface.outliers == 0
            assert (surface.layer, surface.tokens) == (1, 48)
            assert surface.channels == {"qkv": 64, "down": 128}[surface.group]
            assert len(surface.values) == 48
            assert len(surface.values[0]) == {"qkv": 64, "down": 96}[surface.group]
        seen = []
        hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(windows[0])
        hook.remove()
        assert max(map(max, surface.values)) == pytest.approx(seen[0].abs().max().item(), rel=1e-3)


def test_weight_rows(make_toy, windows) -> None:
    model = wrapped(make_toy("llama"))
    rounded = RoundedWeights()
    rows = measure_weights(decoder(model), windows[0], rounded, "before")
    assert len(rows) == 14
    assert [row.role for row in rows[:7]] == list(LLAMA.roles())
    linear = model.model.layers[0].mlp.down_proj
    weight = linear.residual.weight.detach()
    change = rounded(linear) - weight
    found = next(row for row in rows if (row.layer, row.role) == (0, "down_proj"))
    assert found.weight_error == pytest.approx(float(change.square().sum() / weight.square().sum()), rel=1e-4)
    assert 0.002 < found.output_error < 0.05
    for row in rounded(linear)[:3]:
        assert len(row.unique()) <= 16
    steps = [float(torch.diff(row.unique()).min()) for row in rounded(linear)]
    expected = sum(step / float(row.std()) for step, row in zip(steps, weight, strict=True)) / len(weight)
    assert found.step_to_std == pytest.approx(expected, rel=1e-3)


def test_grid_step_ratio() -> None:
    rows = torch.tensor([[1.0, -1.0, 3.0, -3.0], [2.0, 2.0, 2.0, 2.0]])
    found = grid_step_ratio(torch.tensor([0.5, 0.5]), rows)
    assert found[0] == pytest.approx(0.5 / (20 / 3) ** 0.5, rel=1e-6)
    assert found[1] == 0, "values that are alike have no spread"


def test_weights_of_zeros_have_no_error(make_toy, windows) -> None:
    model = wrapped(make_toy("llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.residual.weight.zero_()
    rows = measure_weights(decoder(model), windows[0], RoundedWeights(), "before")
    (row,) = [row for row in rows if (row.layer, row.role) == (1, "o_proj")]
    assert (row.weight_error, row.output_error) == (0, 0)


class TestLoss:
    def test_reference_is_the_perplexity(self, make_toy, windows) -> None:
        model = make_toy("llama")
        reference = Reference.of(decoder(model), windows)
        assert reference.perplexity == pytest.approx(perplexity(model, windows, progress=False).value, rel=1e-6)

    def test_unchanged_model_loses_nothing(self, make_toy, windows) -> None:
        row = LossMeter(decoder(make_toy("llama")), windows, "before").row("nothing", "inputs and weights", "")
        assert row.divergence == pytest.approx(0, abs=1e-6)
        assert row.loss == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("model_type", ["llama", "granite"])
    def test_divergence(self, model_type, make_toy, windows) -> None:
        """Granite scales what comes out of its head."""
        model, other = make_toy(model_type), make_toy(model_type, seed=1)
        meter = LossMeter(decoder(other), windows, "after", Reference.of(decoder(model), windows))
        row = meter.row("all", "weights", "4")
        with torch.no_grad():
            ours, theirs = (m(torch.cat(windows)).logits.double().softmax(-1) for m in (model, other))
        expected = (ours * (ours / theirs).log()).sum(-1).mean().item()
        assert row.divergence == pytest.approx(expected, rel=1e-3)
        both = [perplexity(m, windows, progress=False).nll_per_token for m in (model, other)]
        assert row.loss == pytest.approx(both[1] - both[0], rel=1e-4)

    def test_trials_leave_the_model_as_it_was(self, make_toy, windows) -> None:
        model = wrapped(make_toy("llama"))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        linears = list(decoder(model).linears())
        meter, rounded = LossMeter(decoder(model), windows[:2], "after"), RoundedWeights()
        everything = [*trials.input_trials(linears), *trials.weight_trials(linears)]
        rows = {(row.part, row.quantized, row.bits): row for row in (meter.trial(each, rounded) for each in everything)}
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
        assert not any(linear.module.quantize_input or linear.module.input_quantization for linear in linears)
        assert rows["all", "inputs", "8"].divergence < 0.1 * rows["all", "inputs", "4"].divergence
        assert rows["qkv", "inputs", "4"].divergence < rows["U-type", "inputs", "4"].divergence
        whole = rows["all", "inputs and weights", "4"].divergence
        assert whole > rows["all", "inputs and weights", "U 4, D 8"].divergence > 0

    def test_a_failure_leaves_the_model_as_it_was(self, make_toy, windows) -> None:
        model = wrapped(make_toy("llama"))
        linears = list(decoder(model).linears())
        meter = LossMeter(decoder(model), windows[:1], "after")
        meter.windows = [torch.full((1, 8), 10_000)]
        with pytest.raises(ValueError, match="token ids run from 10000"):
            meter.trial(next(trials.input_trials(linears)))
        assert not any(linear.module.quantize_input for linear in linears)

    @pytest.mark.parametrize("layers", [1, 2, 16, 17, 30, 80])
    def test_runs_of_blocks(self, layers: int) -> None:
        found = trials.slices(layers)
        assert len(found) <= trials.MAX_SLICES
        assert [block for start, stop in found for block in range(start, stop)] == list(range(layers))
        assert trials.slice_name(*found[0]).startswith("block")


def test_grids_are_those_of_the_recipes() -> None:
    from quad_modifiers.recipe import resolve_recipe
    from quad_modifiers.recipe.document import parse_recipe

    entries = parse_recipe(resolve_recipe("quad_w4a4a8").read_text()).entries
    fields = next(entry.fields for entry in entries if entry.name == "DynamicActQuant")
    assert {
        4: InputQuantization(fields["u_type_bits"], fields["u_type_clip_ratio"]),
        8: InputQuantization(fields["d_type_bits"], fields["d_type_clip_ratio"]),
    } == INPUT_GRIDS


def test_tokens_of_zeros_count_as_without_error(make_toy, windows) -> None:
    """A row of the embedding that is zero, as padding often has."""
    model = make_toy(num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[windows[0][0, :10]] = 0
    rows = measure_inputs(decoder(model), windows[:1], "before")
    spectrum = measure_spectrum(decoder(model), windows[:1], windows[0], 64, 8)
    numbers = [row.outlier_energy for row in rows] + spectrum.energy + [error for _, error in spectrum.errors]
    assert all(0 <= number <= 1 for number in numbers), numbers


def test_a_report_of_a_dead_model_can_be_written(tmp_path) -> None:
    file = tmp_path / "numbers.json"
    write_json(LossRow("after", "all", "weights", "4", float("nan"), float("inf"), None, 2.5), file)
    assert '"divergence": null' in file.read_text()
