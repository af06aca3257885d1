"""LowRankBranch: a part of each weight in full precision, chosen so that the rest has flat rows."""

import logging
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import ClassVar

from llmcompressor.modifiers import Modifier
from pydantic import Field

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.base import Batches, QuadModifier
from quad_modifiers.nn.branch_term import BranchTerm
from quad_modifiers.passes.branch_pass import add_branches
from quad_modifiers.quantization.flat_residual import flat_residual
from quad_modifiers.recipe.coverage import covered, is_ignored, linear_names
from quad_modifiers.recipe.order import QUANTIZE_ACTIVATIONS, QUANTIZE_WEIGHTS, PlacedModifier
from quad_modifiers.reporting import layer_progress

logger = logging.getLogger(__name__)


class LowRankBranch(QuadModifier):
    """Takes a low-rank part A B out of each weight before it is quantized, after FRTQ (OpenReview mUB2N8L0vD).

    The part stays in the model's dtype and reads the unquantized input: y = (x B^T) A^T + quantized(W - A B) x. A
    truncated SVD is improved in turns with the clipping of the rows that it leaves, by the second moment of the inputs;
    the steps are ours, docs/concepts/frtq.md derives them. It is a term of the linear: transformers computes it, also
    after tuning or as a plain model; vLLM and the export to compressed-tensors refuse it by name.

    Lifecycle:

    - check
        - the rank
    - run
        - block by block: second moments of the inputs, the part, the residual weight

    Attributes:
        rank: columns of A. A linear takes rank * (in + out) more weights in 16 bits, and as many more products.
        rounds: rounds of clipping and low-rank fit after the truncated SVD.
        quantile: share of a row's magnitudes that its bound does not clip, at the start.
        damping: how much all input directions count alike, as a fraction of the mean of the second moment's diagonal.
        ignore: linears that get no branch, by the last parts of their names or by "re:" patterns.
    """

    recipe_role: ClassVar[str | None] = "branch"

    rank: int = Field(default=16, ge=1)
    rounds: int = Field(default=10, ge=0)
    quantile: float = Field(default=0.99, gt=0.5, le=1.0)
    damping: float = Field(default=0.1, gt=0.0)
    ignore: list[str] = Field(default=["lm_head"])

    def check_company(self, others: Sequence[Modifier]) -> None:
        """Refuses a second one, and a recipe that has no use for it.

        Raises:
            ValueError: in these cases.
        """
        if any(isinstance(other, LowRankBranch) for other in others):
            raise ValueError("the recipe has another LowRankBranch; keep one of them")
        if not any(_quantizes(other, QUANTIZE_WEIGHTS, "weights") for other in others):
            raise ValueError(
                "it takes a part out of weights that are quantized later, and the recipe quantizes none; add "
                "OutlierSplitGPTQ after it"
            )
        if not any(_quantizes(other, QUANTIZE_ACTIVATIONS, "input_activations") for other in others):
            raise ValueError(
                "it is made for products of integers, and a weight-only recipe leaves all inputs in full precision; "
                "add DynamicActQuant, or leave LowRankBranch out"
            )

    def check(self, decoder: Decoder) -> None:
        """Checks that the rank leaves something to quantize.

        Raises:
            ValueError: naming the first linear of which it leaves nothing.
        """
        for linear in decoder.linears():
            smaller = min(linear.module.in_features, linear.module.out_features)
            if not self._is_ignored(linear.name) and self.rank >= smaller:
                raise ValueError(
                    f"rank ({self.rank}) must be smaller than both sides of {linear.name} ({smaller}); choose about "
                    f"{max(1, smaller // 16)}"
                )

    def run(self, decoder: Decoder, batches: Batches) -> None:
        """Gives the linears their branches.

        Raises:
            ValueError: naming a linear that is quantized already or has a branch.
        """
        for linear in decoder.linears():
            if linear.module.is_quantized:
                raise ValueError(f"{linear.name} is quantized already; put LowRankBranch before what quantizes weights")
            if any(isinstance(term, BranchTerm) for term in linear.module.terms()):
                raise ValueError(f"{linear.name} has a low-rank branch already; start from the original model")
        find = partial(flat_residual, rank=self.rank, rounds=self.rounds, quantile=self.quantile, damping=self.damping)
        done = add_branches(decoder, batches(), find, self._is_ignored)
        first, last = [], []
        for _ in layer_progress(decoder.blocks, "low-rank branches"):
            for losses in next(done):
                first.append(losses[0])
                last.append(losses[-1])
        if first:
            logger.info(
                "LowRankBranch: rank %d; error of clipping the residual's rows over the output %.3g after the SVD, "
                "%.3g after %d rounds",
                self.rank,
                fmean(first),
                fmean(last),
                self.rounds,
            )

    def _is_ignored(self, name: str) -> bool:
        return is_ignored(name, self.ignore)


def _quantizes(other: Modifier, role: str, part: str) -> bool:
    """Whether a modifier quantizes that part of a linear in the blocks, not of the ends alone."""
    names = (*linear_names(), *linear_names(child="residual"))
    return role in PlacedModifier(other).roles and bool(covered(other, part, names))
