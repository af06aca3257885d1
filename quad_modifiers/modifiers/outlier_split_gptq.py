"""OutlierSplitGPTQ: weight quantization around outlier columns of higher precision."""

import logging
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import Field, PrivateAttr, model_validator
from quad_kernels import NumberFormat, QuantizedWeight, WeightGrid
from quad_kernels.float4 import GROUP_SIZES
from quad_kernels.formats import weight_grid

from quad_modifiers.model.decoder import Decoder, PlacedLinear
from quad_modifiers.modifiers.base import Batches, QuadModifier
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import OUTLIER_GRID
from quad_modifiers.passes.weight_pass import quantize_blocks
from quad_modifiers.quantization.group import LinearReport, WeightQuantization
from quad_modifiers.recipe.coverage import is_ignored, outlier_names
from quad_modifiers.recipe.layer_bits import WeightBits, override_of
from quad_modifiers.recipe.order import PROJECT, PlacedModifier
from quad_modifiers.reporting import layer_progress, table

logger = logging.getLogger(__name__)


Share = Annotated[float, Field(ge=0.0, le=1.0)]


class OutlierSplitGPTQ(QuadModifier):
    """Quantizes the residual weights with GPTQ (arXiv 2210.17323) or by rounding to nearest.

    The outlier columns take part in the Hessian, come last, and absorb error; they stay in full precision, or are
    rounded to 8 bits in the end. The Hessian is that of the inputs the runtime computes with: behind the already
    quantized blocks, after input quantization.

    Lifecycle:

    - run
        - block by block: moments of the inputs, quantization, propagation
    - on_finalize
        - log the table of errors

    Attributes:
        method: "gptq", or "rtn" (round to nearest, needs no data).
        bits: 4, or 8 or 2.
        group_size: input coordinates per scale; None is one scale per output channel.
        sub_scale_bits: 4 for integers of two levels: a group has a 4-bit integer factor, an output channel the scale,
            and sums of products stay exact integers; None for a floating-point scale per group.
        symmetric: False adds a zero point per scale.
        number_format: "int", or 4-bit floating-point numbers in groups of their own: "nvfp4" (16 numbers, a scale of 8
            bits) or "mxfp4" (32, a power of two). `group_size` is left out then.
        outlier_bits: 8 rounds the outlier columns, too, with one symmetric scale per output channel of their own (ResQ,
            arXiv 2412.14363); None leaves them in full precision.
        clip_search: choose each scale by weighted squared error instead of the largest weight.
        scale_candidates: factors on the chosen scale, tried with the whole of GPTQ; each output channel keeps its best.
        activation_order: process columns by falling input energy.
        damping: first damping tried, as a fraction of the mean of the Hessian's residual diagonal; grows until the
            factorization succeeds, the table says by how much.
        block_size: columns whose mutual updates are done at once.
        sweeps: coordinate-descent sweeps that revisit the rounding after GPTQ.
        error_correction: 0 to 1, how far weights are first moved to make up for the error of earlier layers; "auto"
            finds out for each group of linears, by what each half of the calibration tokens says of the other's advice.
        overrides: other `bits` for some linears, by layers and by names; of several for one linear the last counts.
            Those that share their input (q, k and v; gate and up) must have the same.
        ignore: linears that stay in full precision, by the last parts of their names or by "re:" patterns.
    """

    recipe_role: ClassVar[str | None] = "quantize_weights"

    method: Literal["gptq", "rtn"] = "gptq"
    bits: Literal[2, 4, 8] = 4
    group_size: int | None = Field(default=None, ge=8)
    symmetric: bool = True
    sub_scale_bits: Literal[4] | None = None
    number_format: NumberFormat = "int"
    outlier_bits: Literal[8] | None = None
    clip_search: bool = True
    scale_candidates: list[Annotated[float, Field(gt=0)]] = Field(default=[1.0], min_length=1)
    activation_order: bool = True
    damping: float = Field(default=0.01, ge=0.0, le=1.0)
    block_size: int = Field(default=128, ge=1)
    sweeps: int = Field(default=0, ge=0)
    error_correction: Share | Literal["auto"] = 0.0
    overrides: list[WeightBits] = Field(default=[])
    ignore: list[str] = Field(default=["lm_head"])

    _reports: dict[str, dict[str, LinearReport]] = PrivateAttr(default_factory=dict)  # by block and group
    _seconds: float = PrivateAttr(default=0.0)

    def check_company(self, others: Sequence[Modifier]) -> None:
        """Checks that outliers that are to have 8 bits will be there.

        Raises:
            ValueError: if no projection makes any.
        """
        if self.outlier_bits is not None:
            projections = [each for each in others if PROJECT in PlacedModifier(each).roles]
            if not any(outlier_names(each) for each in projections):
                raise ValueError(
                    f"outlier_bits ({self.outlier_bits}) is for outlier columns, and there are none (rank 0, or no "
                    "projection); leave it out, or put SVDOutlierProjection with a rank before it"
                )

    def run(self, decoder: Decoder, batches: Batches) -> None:
        """Quantizes the model block by block."""
        self._check_widths(decoder)
        for linear in decoder.linears():
            if self._is_ignored(linear.name):  # its outlier weight stays as it is, and so do the inputs
                linear.module.outlier_quantization = None
        data = batches() if self.method == "gptq" else None
        others = f", in some linears {self._other_bits()}" if self.overrides else ""
        logger.info("OutlierSplitGPTQ: %s, %d bits%s, %s", self.method, self.bits, others, self._granularity())
        start = time.perf_counter()
        done = quantize_blocks(decoder, data, self._settings(), _install, self._is_ignored, self._grid_of)
        for block in layer_progress(decoder.blocks, "quantizing"):
            worst = self._reports.setdefault(block.name, {})
            for group, report in next(done):
                name = ",".join(member.name for member in group.group.members)
                if name not in worst or report.error > worst[name].error:  # of the experts, the worst
                    worst[name] = report
        self._seconds = time.perf_counter() - start

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Logs the error of every group of linears."""
        if self._reports:
            logger.info(
                "OutlierSplitGPTQ took %.0f s; signal to error of each output [dB]\n%s",
                self._seconds,
                self._error_table(),
            )
        return super().on_finalize(state, **kwargs)

    def _error_table(self) -> str:
        """One row per block, one column per group of linears, of several experts the worst."""
        groups = list(dict.fromkeys(group for row in self._reports.values() for group in row))
        rows = [(block, *(_decibels(row.get(group)) for group in groups)) for block, row in self._reports.items()]
        return table(("block", *groups), rows)

    def _other_bits(self) -> str:
        return " or ".join(str(bits) for bits in sorted({each.bits for each in self.overrides}))

    def _granularity(self) -> str:
        if self.number_format != "int":
            return self.number_format
        if self.group_size is None:
            return "one scale per output channel"
        return f"groups of {self.group_size}{' of two levels' if self.sub_scale_bits else ''}"

    @model_validator(mode="after")
    def _check_grid(self) -> "OutlierSplitGPTQ":
        for bits in (self.bits, *(override.bits for override in self.overrides)):
            self._grid(bits)
        if self.number_format != "int" and self.scale_candidates != [1.0]:
            raise ValueError(
                f"scale_candidates ({self.scale_candidates}) are for integers; {self.number_format} stores some scales "
                "only, and clip_search tries those"
            )
        return self

    def bits_of(self, linear: PlacedLinear) -> int | None:
        """Returns the bits that the weight of a linear will have, None for one that is left alone."""
        if self._is_ignored(linear.name):
            return None
        override = override_of(self.overrides, linear)
        return self.bits if override is None else override.bits

    def words_of(self, linear: PlacedLinear) -> str:
        """Returns what becomes of a linear where it may differ from others, in words; nothing if it is left alone."""
        bits = self.bits_of(linear)
        return "" if bits is None else f"{bits} bits"

    def _grid(self, bits: int) -> WeightGrid:
        size = GROUP_SIZES.get(self.number_format) if self.group_size is None else self.group_size
        return weight_grid(bits, size, self.symmetric, self.sub_scale_bits, self.number_format)

    def _grid_of(self, linear: PlacedLinear) -> WeightGrid:
        return self._grid(self.bits_of(linear) or self.bits)

    def _settings(self) -> WeightQuantization:
        return WeightQuantization(
            grid=self._grid(self.bits),
            clip_search=self.clip_search,
            scale_candidates=tuple(self.scale_candidates) if self.symmetric else (1.0,),
            activation_order=self.activation_order,
            damping=self.damping,
            block_size=self.block_size,
            sweeps=self.sweeps,
            error_correction=self.error_correction,
            outlier_grid=None if self.outlier_bits is None else OUTLIER_GRID,
        )

    def _is_ignored(self, name: str) -> bool:
        return is_ignored(name, self.ignore)

    def _check_widths(self, decoder: Decoder) -> None:
        for linear in decoder.linears():
            if not self._is_ignored(linear.name):
                try:
                    self._grid(self.bits).groups(linear.module.split.residual_width)
                except ValueError as error:
                    raise ValueError(f"{linear.name}: {error}") from error


def _install(linear: PlacedLinear, weight: QuantizedWeight) -> None:
    """Puts the packed weight in the place of the residual linear, on its device."""
    container = linear.module
    packed = PackedLinear.of(weight, weight.scale.dtype, container.input_quantization)
    container.residual = packed.to(container.qweight.device)


def _decibels(report: LinearReport | None) -> str:
    """A cell of the table of errors; a damping that had to grow is marked."""
    if report is None:
        return "-"
    grown = f" (damping {report.damping:g} after {report.attempts} attempts)" if report.attempts > 1 else ""
    return f"{report.decibels:.1f}{grown}"
