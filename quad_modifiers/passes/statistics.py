"""What the projection needs to know about the activations."""

from dataclasses import dataclass

import torch
from torch import nn

from quad_modifiers.linalg import StreamingGram
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.geometry import ModelGeometry
from quad_modifiers.passes.blockwise import BlockSegments, first_block_inputs, in_float32
from quad_modifiers.reporting import layer_progress


@dataclass
class ActivationStatistics:
    """Second moments of the inputs of the linears, float64.

    Attributes:
        residual: mean of x^T x / rms(x)^2 over all norms that feed quantized linears, `[hidden, hidden]`.
        heads: per layer, second moment of the o_proj input per key-value head, `[kv_heads, head_dim, head_dim]`.
        mlp: per layer, energy (sum of squares) of each down_proj input channel, `[intermediate]`.
    """

    residual: torch.Tensor
    heads: list[torch.Tensor]
    mlp: list[torch.Tensor]


def _normalized(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMS-normalized stream without the norm's weight, which is folded into the linears."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)


@torch.no_grad()
def collect_statistics(
    model: nn.Module,
    architecture: Architecture,
    batches: list[dict[str, torch.Tensor]],
    geometry: ModelGeometry,
) -> ActivationStatistics:
    """Streams the calibration batches through the model, one block at a time.

    Args:
        model: in its original basis.
        architecture: names of its parts.
        batches: `input_ids` and optional `attention_mask`.
        geometry: sizes of the model.

    Raises:
        ValueError: naming the layer in which an activation is NaN or infinite.
    """
    stream = first_block_inputs(model, architecture, batches)
    residual = StreamingGram(geometry.hidden, stream[0].hidden.device)
    heads, mlp = [], []
    layers = list(model.get_submodule(architecture.layers).children())
    for index, layer in enumerate(layer_progress(layers, "calibrating")):
        head_grams = [StreamingGram(geometry.head_dim, residual.total.device) for _ in range(geometry.kv_heads)]
        energy = torch.zeros(geometry.intermediate, dtype=torch.float64, device=residual.total.device)
        try:
            with in_float32(layer):
                segments = BlockSegments(layer, architecture)
                for batch in stream:
                    seen = segments.forward(batch.hidden, batch.arguments[index])
                    residual.add(batch.tokens(_normalized(batch.hidden, geometry.eps)))
                    residual.add(batch.tokens(_normalized(seen["middle"], geometry.eps)))
                    values = batch.tokens(seen["attention_core"]).unflatten(
                        -1, (geometry.kv_heads, -1, geometry.head_dim)
                    )
                    for head, gram in enumerate(head_grams):
                        gram.add(values[:, head])
                    energy += batch.tokens(seen["mlp_core"]).double().square().sum(0)
                    if not torch.isfinite(seen["output"]).all():  # no norm comes after the last block
                        raise ValueError("its output is NaN or infinite")
                    batch.hidden = seen["output"]
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
        heads.append(torch.stack([gram.mean() for gram in head_grams]))
        mlp.append(energy)
    return ActivationStatistics(residual.mean(), heads, mlp)
