"""Where the perplexity is lost: the model with one part quantized at a time, against the model without."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from quad_kernels import InputQuantization
from torch import nn

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.tools.evaluation import perplexity
from quad_modifiers.tools.inspection.measure.groups import INPUT_GRIDS
from quad_modifiers.tools.inspection.measure.results import LossRow, Quantized, Stage
from quad_modifiers.tools.inspection.measure.trials import Trial
from quad_modifiers.tools.inspection.measure.weights import RoundedWeights


@dataclass(frozen=True)
class Reference:
    """The model that trials are compared with.

    Attributes:
        losses: mean negative log-likelihood of a token in each window, `[windows]`, float64, nats.
        logits: `[length, vocabulary]` for each window, in the model's dtype.
    """

    losses: torch.Tensor
    logits: list[torch.Tensor]

    @classmethod
    def of(cls, decoder: Decoder, windows: list[torch.Tensor]) -> "Reference":
        """Runs the model as it is."""
        logits: list[torch.Tensor] = []
        return cls(_window_losses(decoder, windows, lambda _, seen: logits.append(seen)), logits)

    @property
    def perplexity(self) -> float:
        """Perplexity over all windows."""
        return self.losses.mean().exp().item()

    def divergence(self, index: int, logits: torch.Tensor) -> float:
        """Returns the KL divergence of other logits of a window from these, mean over tokens, nats."""
        ours, theirs = (x.to(logits.device).float().log_softmax(-1) for x in (self.logits[index], logits))
        return nn.functional.kl_div(theirs, ours, reduction="sum", log_target=True).item() / len(logits)


def _window_losses(
    decoder: Decoder, windows: list[torch.Tensor], see: Callable[[int, torch.Tensor], None]
) -> torch.Tensor:
    """Returns the mean negative log-likelihood in each window, and shows `see` the logits of each."""
    losses = []
    head = decoder.head
    for index, window in enumerate(windows):
        handle = head.register_forward_hook(lambda _, __, logits, i=index: see(i, logits.detach().flatten(0, -2)))
        try:
            losses.append(perplexity(decoder.model, [window], progress=False).nll_per_token)
        finally:
            handle.remove()
    return torch.tensor(losses, dtype=torch.float64)


class LossMeter:
    """Measures trials against a reference, each window on its own.

    Args:
        decoder: with `QuadLinear` linears.
        windows: token ids, `[1, length]` each.
        stage: name of the stage in the rows.
        reference: reference on the same windows; the model as it is now by default.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: list[torch.Tensor],
        stage: Stage,
        reference: Reference | None = None,
    ) -> None:
        self.decoder, self.windows, self.stage = decoder, windows, stage
        self.reference = Reference.of(decoder, windows) if reference is None else reference

    def row(self, part: str, quantized: Quantized, bits: str) -> LossRow:
        """Returns the row of the model as it is at this moment."""
        divergences: list[float] = []
        losses = _window_losses(
            self.decoder,
            self.windows,
            lambda index, logits: divergences.append(self.reference.divergence(index, logits)),
        )
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
        with ExitStack() as stack:
            for linear, bits in trial.inputs.items():
                stack.enter_context(_quantized_input(linear, INPUT_GRIDS[bits]))
            for linear in trial.weights:
                assert rounded is not None
                stack.enter_context(_replaced_weight(linear, rounded(linear)))
            return self.row(trial.part, trial.quantized, trial.bits)


@contextmanager
def _quantized_input(linear: QuadLinear, quantization: InputQuantization) -> Iterator[None]:
    before = linear.input_quantization, linear.quantize_input
    linear.input_quantization, linear.quantize_input = quantization, True
    try:
        yield
    finally:
        linear.input_quantization, linear.quantize_input = before


@contextmanager
def _replaced_weight(linear: QuadLinear, weight: torch.Tensor) -> Iterator[None]:
    original = linear.residual.weight
    linear.residual.weight = nn.Parameter(weight.to(original), requires_grad=False)
    try:
        yield
    finally:
        linear.residual.weight = original


@contextmanager
def unquantized_inputs(linears: Iterable[QuadLinear]) -> Iterator[None]:
    """Switches the input quantization of linears off."""
    switched = [linear for linear in linears if linear.quantize_input]
    for linear in switched:
        linear.quantize_input = False
    try:
        yield
    finally:
        for linear in switched:
            linear.quantize_input = True
