"""A compressed model against its original, block by block, in the original's basis.

A projection changes the basis of the residual stream, and a checkpoint does not store it. But both models embed the
same tokens: the map between the streams is the one between their embeddings, which least squares recovers to the
rounding of the weights.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.tools.inspection.measure.loss import unquantized_inputs
from quad_modifiers.tools.inspection.measure.results import BlockRow
from quad_modifiers.tools.inspection.measure.watch import watching

_ROWS_PER_COORDINATE = 4  # embeddings in the fit
_MAX_UNEXPLAINED = 0.02  # 8-bit embeddings leave 1e-4, an unrelated model most of it


@dataclass(frozen=True)
class StreamMap:
    """The change of basis of the residual stream."""

    there: torch.Tensor  # map from the original's stream to the other's, `[d, width]`
    back: torch.Tensor  # pseudo-inverse of `there`, `[width, d]`

    @classmethod
    @torch.no_grad()
    def fit(cls, original: Decoder, other: Decoder) -> "StreamMap":
        """Recovers the map from the embeddings of both models.

        Raises:
            ValueError: if the models have other vocabularies, or no linear map takes one embedding to the other.
        """
        tables = [decoder.embedding for decoder in (original, other)]
        models = [decoder.model for decoder in (original, other)]
        rows = [model.config.vocab_size for model in models]
        if rows[0] != rows[1]:
            raise ValueError(f"the baseline embeds {rows[0]} tokens, the checkpoint {rows[1]}: it was made of another")
        count = min(rows[0], _ROWS_PER_COORDINATE * models[0].config.hidden_size)
        ids = torch.linspace(0, rows[0] - 1, count).long()
        source, target = (t(ids.to(m.device)).double().cpu() for t, m in zip(tables, models, strict=True))
        gram = source.T @ source
        level = gram.diagonal().mean()
        if not level > 0:
            raise ValueError("the baseline's embeddings are zero throughout; the model is damaged, get it again")
        ridge = 1e-9 * level * torch.eye(len(gram), dtype=gram.dtype)
        there = torch.linalg.solve(gram + ridge, source.T @ target)
        unexplained = float((source @ there - target).square().sum() / target.square().sum())
        if not unexplained < _MAX_UNEXPLAINED:
            raise ValueError(
                f"no change of basis takes the baseline's embeddings to the checkpoint's ({100 * unexplained:.0f} % of "
                "them is left): it was made of another model; give the original that it was made of"
            )
        return cls(there.float(), torch.linalg.pinv(there).float())


@torch.no_grad()
def measure_blocks(original: Decoder, other: Decoder, windows: list[torch.Tensor]) -> list[BlockRow]:
    """Returns one row per block.

    Raises:
        ValueError: if `other` was not made of `original`.
    """
    layers, found = len(original.blocks), len(other.blocks)
    if found != layers:
        raise ValueError(f"the baseline has {layers} blocks, the checkpoint {found}: it was made of another model")
    stream_map = StreamMap.fit(original, other)
    linears = [linear.module for linear in other.linears() if isinstance(linear.module, QuadLinear)]
    sums, tokens = torch.zeros(layers, 3, dtype=torch.float64), 0
    for window in windows:
        truth = _streams(original, window)
        free = _streams(other, window, stream_map.back)
        led = _streams(other, window, stream_map.back, lead=(truth, stream_map.there))
        with unquantized_inputs(linears):
            weights_only = _streams(other, window, stream_map.back, lead=(truth, stream_map.there))
        for layer in range(layers):
            wanted, added = truth[layer + 1], truth[layer + 1] - truth[layer]
            sums[layer, 0] += _summed_error(free[layer + 1], wanted, wanted)
            sums[layer, 1] += _summed_error(led[layer + 1], wanted, added)
            sums[layer, 2] += _summed_error(weights_only[layer + 1], wanted, added)
        tokens += len(truth[0])
    return [BlockRow(layer, *row) for layer, row in enumerate((sums / tokens).tolist())]


def _summed_error(stream: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor) -> float:
    """Returns the sum over tokens of |stream - wanted|^2 / |scale|^2: each token counts alike, a massive one too."""
    energy = scale.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((stream - wanted).square().sum(-1) / energy).double().sum())


def _streams(
    decoder: Decoder,
    window: torch.Tensor,
    back: torch.Tensor | None = None,
    lead: tuple[list[torch.Tensor], torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Returns the stream before the first block and after every block, `[tokens, d]`, float32, mapped by `back`.

    With `lead`, the original's streams and the map from them, every block gets the original's stream as its input.
    """
    streams: list[torch.Tensor] = []

    def keep(stream: torch.Tensor) -> None:
        flat = stream.flatten(0, -2).float()
        streams.append(flat if back is None else flat @ back.to(flat.device))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        stack.enter_context(watching([(decoder.blocks[0].module, keep)]))
        for layer, block in enumerate(decoder.blocks):
            stack.enter_context(block.module.register_forward_hook(after))
            if lead is not None:
                given = _replacing(lead[0][layer] @ lead[1].to(lead[0][layer].device))
                stack.enter_context(block.module.register_forward_pre_hook(given, with_kwargs=True))
        decoder.run(window)
    return streams


def _replacing(stream: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = stream.to(hidden).view_as(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return hook
