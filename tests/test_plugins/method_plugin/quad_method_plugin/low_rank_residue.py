"""The modifier that moves the largest part of each weight into a low-rank term."""

import torch
from pydantic import Field
from quad_kernels import split_input

from quad_method_plugin.low_rank import LowRank
from quad_modifiers.checkpoint.dequantize import dense_weight
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.base import Batches, QuadModifier


class LowRankResidue(QuadModifier):
    """Takes the first singular directions out of each weight, in full precision; what is left is quantized later.

    It comes after a projection and before the quantization of the weights.
    """

    rank: int = Field(default=16, ge=1, description="directions that stay in full precision")

    def check(self, decoder: Decoder) -> None:
        for linear in decoder.linears():
            smaller = min(linear.module.in_features, linear.module.out_features)
            if self.rank >= smaller:
                raise ValueError(f"rank ({self.rank}) must be smaller than both sides of {linear.name} ({smaller})")

    def run(self, decoder: Decoder, batches: Batches) -> None:
        for linear in decoder.linears():
            container = linear.module
            if container.is_quantized:
                raise ValueError(f"{linear.name} is quantized already; put LowRankResidue before OutlierSplitGPTQ")
            weight = dense_weight(container)  # on the unsplit input, as the term is
            left, values, right = torch.linalg.svd(weight, full_matrices=False)
            root = values[: self.rank].sqrt()
            down, up = root[:, None] * right[: self.rank], left[:, : self.rank] * root
            term = LowRank(down.to(container.qweight), up.to(container.qweight))
            outlier, residual = split_input(weight - term.dense(), container.split)
            container.set_weights(container.split, residual, outlier, container.bias)
            container.add_term(term)
