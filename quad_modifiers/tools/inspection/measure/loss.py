"""Where the perplexity is lost: the model with one part quantized at a time, against the model without."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.tools.evaluation import perplexity
from quad_modifiers.tools.inspection.measure.results import LossRow, Quantized, Stage
from quad_modifiers.tools.inspection.measure.trials import Trial
from quad_modifiers.tools.inspection.measure.watch import INPUT_GRIDS
from quad_modifiers.tools.inspection.measure.weights import RoundedWeights


@dataclass(frozen=True)
class Reference:
    """The model that trials are compared with."""

    losses: torch.Tensor  # mean negative log-likelihood of a token in each window, `[windows]`, float64, nats
    logits: list[torch.Tensor]  # `[length, vocabulary]` for each window, in the model's dtype

    @classmethod
    def of(cls, decoder: Decoder, windows: list[torch.Tensor]) -> "Reference":
        """Runs the model as it is."""
        losses, logits = zip(*_run(decoder, windows), strict=True)
        return cls(torch.tensor(losses, dtype=torch.float64), list(logits))

    @property
    def perplexity(self) -> float:
        """Perplexity over all windows."""
        return self.losses.mean().exp().item()

    def divergence(self, index: int, logits: torch.Tensor) -> float:
        """Returns the KL divergence of other logits of a window from these, mean over tokens, nats."""
        ours, theirs = (x.to(logits.device).float().log_softmax(-1) for x in (self.logits[index], logits))
        return nn.functional.kl_div(theirs, ours, reduction="sum", log_target=True).item() / len(logits)


def _run(decoder: Decoder, windows: list[torch.Tensor]) -> Iterator[tuple[float, torch.Tensor]]:
    """Yields the mean negative log-likelihood in each window, and its logits."""
    for window in windows:
        seen: list[torch.Tensor] = []
        # Not the head's output: some models scale that.
        with decoder.model.register_forward_hook(lambda _, __, found, keep=seen.append: keep(found.logits)):
            loss = perplexity(decoder.model, [window], progress=False).nll_per_token
        yield loss, seen[-1].detach().flatten(0, -2)


class LossMeter:
    """Measures trials against a reference on the same windows, `[1, length]` each; by default the model as it is."""

    def __init__(
        self, decoder: Decoder, windows: list[torch.Tensor], stage: Stage, reference: Reference | None = None
    ) -> None:
        self.decoder, self.windows, self.stage = decoder, windows, stage
        self.reference = Reference.of(decoder, windows) if reference is None else reference

    def row(self, part: str, quantized: Quantized, bits: str) -> LossRow:
        """Returns the row of the model as it is at this moment."""
        found, divergences = [], []
        for index, (loss, logits) in enumerate(_run(self.decoder, self.windows)):
            found.append(loss)
            divergences.append(self.reference.divergence(index, logits))
        losses = torch.tensor(found, dtype=torch.float64)
        more = losses - self.reference.losses
        return LossRow(
            self.stage,
            part,
            quantized,
            bits,
            divergence=sum(divergences) / len(divergences),
            loss=more.mean().item(),
            stderr=more.std().item() / math.sqrt(len(more)) if len(more) > 1 else None,
            perplexity=losses.mean().exp().item(),
        )

    def trial(self, trial: Trial, rounded: RoundedWeights | None = None) -> LossRow:
        """Returns the row of the model with a part quantized; afterwards the model is what it was."""
        with tried(trial, rounded):
            return self.row(trial.part, trial.quantized, trial.bits)


@contextmanager
def tried(trial: Trial, rounded: RoundedWeights | None = None) -> Iterator[None]:
    """Quantizes a part of a model inside the block; weights as `rounded` says."""
    with ExitStack() as stack:
        for linear, bits in trial.inputs.items():
            grid = INPUT_GRIDS[bits] if isinstance(bits, int) else bits
            stack.enter_context(_with(linear, input_quantization=grid, quantize_input=True))
        for linear in trial.weights:
            assert rounded is not None
            weight = nn.Parameter(rounded(linear).to(linear.residual.weight), requires_grad=False)
            stack.enter_context(_with(linear.residual, weight=weight))
        yield


@contextmanager
def _with(module: nn.Module, **attributes: Any) -> Iterator[None]:
    """Gives a module other attributes inside the block."""
    before = {name: getattr(module, name) for name in attributes}
    for name, value in attributes.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


@contextmanager
def unquantized_inputs(linears: Iterable[QuadLinear]) -> Iterator[None]:
    """Switches the input quantization of linears off."""
    with ExitStack() as stack:
        for linear in linears:
            stack.enter_context(_with(linear, quantize_input=False))
        yield
