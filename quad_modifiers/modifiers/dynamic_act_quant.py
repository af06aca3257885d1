"""DynamicActQuant: integer quantization of the inputs of the linears, at run time."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from llmcompressor.modifiers import Modifier
from pydantic import Field, model_validator
from quad_kernels import InputQuantization, NumberFormat
from quad_kernels.float4 import GROUP_SIZES

from quad_modifiers.model.architecture import Group
from quad_modifiers.model.decoder import Decoder, PlacedGroup, PlacedLinear
from quad_modifiers.modifiers.base import Batches, QuadModifier
from quad_modifiers.passes.clip_ratios import choose_clip_ratios, ratio_key
from quad_modifiers.recipe.layer_bits import InputBits, override_of

logger = logging.getLogger(__name__)


ClipRatio = Annotated[float, Field(gt=0.3, le=1.0)]


class DynamicActQuant(QuadModifier):
    """Quantizes the residual part of each linear's input with scales taken from the input itself.

    The outlier coordinates bypass it (QUAD, arXiv 2503.19353, section 3.3), or get 8 bits and scales of their own
    (ResQ, arXiv 2412.14363, section 4.1). U-type linears read the residual stream
    (q, k, v, gate, up), D-type linears write it (o_proj, down_proj); "W4A4/A8" is 4 bits for the former, 8 for the
    latter.

    Lifecycle:

    - prepare
        - set the input quantization of the linears
    - run
        - check the group size against the final widths
        - choose the clip ratios that are "auto", on some calibration tokens
        - switch the quantization on

    Attributes:
        u_type_bits: bits of U-type inputs, None leaves them unquantized.
        d_type_bits: bits of D-type inputs, None leaves them unquantized.
        strategy: one scale per "token", or per "group" of a token.
        group_size: coordinates per scale for strategy "group".
        sub_scale_bits: 4 for integers of two levels: a group has a 4-bit integer factor and a token the scale, so that
            kernels add up integers as with one scale per token; for inputs of up to 4 bits. None for a floating-point
            scale per group.
        symmetric: False gives each scale a zero point: the grid reaches from the smallest coordinate to the largest, as
            ResQ and compressed-tensors' asymmetric inputs have it. For inputs of up to 7 bits, without sub_scale_bits;
            quantized outlier coordinates stay symmetric.
        number_format: "int", or 4-bit floating-point numbers in groups of their own: "nvfp4" (16 numbers, a scale of 4
            significant bits) or "mxfp4" (32, a power of two). `strategy` and `group_size` are left out then.
        four_over_six: True makes the largest number of a group of nvfp4 6 or 4, whichever rounds the group with less
            error (arXiv 2512.02010): an input is rounded twice for it.
        o_proj_scale: one scale of the input of o_proj per "token", or per token and "head" (ResQ), whatever `strategy`
            says of the others; by default as the others.
        outlier_bits: 8 quantizes the outlier coordinates of quantized inputs, with one scale per token, where their
            weights have 8 bits, too (`OutlierSplitGPTQ.outlier_bits`); None leaves them unquantized.
        u_type_clip_ratio, d_type_clip_ratio: share of the largest magnitude (of the range, with zero points) that the
            grid covers; 1.0 is the grid of compressed-tensors, the paper's 0.9 of absmax / 7 is 0.964. "auto" takes for
            each role the one of least output error on calibration tokens: the wider an input, the more its largest
            magnitude stands out.
        overrides: other bits, and maybe another clip ratio, for the inputs of some linears, by layers and by names; of
            several for one linear the last counts. Those that share their input (q, k and v; gate and up) must have
            the same.
    """

    recipe_role: ClassVar[str | None] = "quantize_activations"
    has_own_pass: ClassVar[bool] = False

    u_type_bits: int | None = Field(default=4, ge=2, le=8)
    d_type_bits: int | None = Field(default=4, ge=2, le=8)
    strategy: Literal["token", "group"] = "token"
    group_size: int | None = Field(default=None, ge=8)
    sub_scale_bits: Literal[4] | None = None
    symmetric: bool = True
    number_format: NumberFormat = "int"
    four_over_six: bool = False
    o_proj_scale: Literal["token", "head"] | None = None
    outlier_bits: Literal[8] | None = None
    u_type_clip_ratio: ClipRatio | Literal["auto"] = 0.92
    d_type_clip_ratio: ClipRatio | Literal["auto"] = 0.92
    overrides: list[InputBits] = Field(default=[])

    @model_validator(mode="after")
    def _check_group(self) -> "DynamicActQuant":
        if self.number_format != "int" and self.strategy == "group":
            raise ValueError(
                f"number_format ({self.number_format!r}) has groups of its own; leave strategy and group_size out"
            )
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size ({self.group_size}) goes with strategy 'group' and only with it (strategy is "
                f"{self.strategy!r})"
            )
        if self.four_over_six and self.number_format != "nvfp4":
            raise ValueError(f"four_over_six is for number_format nvfp4, not {self.number_format}; leave it out")
        for bits in (self.u_type_bits, self.d_type_bits, *(override.bits for override in self.overrides)):
            if bits is not None:
                self._quantization(bits, 1.0)
        whole = self.sub_scale_bits is None and self.number_format == "int"
        if self.o_proj_scale is not None and (self.d_type_bits is None or not whole):
            raise ValueError(
                f"o_proj_scale ({self.o_proj_scale!r}) is for quantized D-type inputs without sub_scale_bits "
                f"(d_type_bits is {self.d_type_bits}, sub_scale_bits {self.sub_scale_bits}, number_format "
                f"{self.number_format}); leave it out"
            )
        if self.outlier_bits is not None and self.u_type_bits is None and self.d_type_bits is None:
            raise ValueError(
                f"outlier_bits ({self.outlier_bits}) is for the outlier coordinates of quantized inputs, and none are "
                "(u_type_bits and d_type_bits); leave it out"
            )
        return self

    def check_company(self, others: Sequence[Modifier]) -> None:
        """Checks that the weights of outlier inputs that are to have 8 bits will have them, too.

        Raises:
            ValueError: if they will not.
        """
        if self.outlier_bits is not None and not any(getattr(each, "outlier_bits", None) for each in others):
            raise ValueError(
                f"outlier_bits ({self.outlier_bits}) needs outlier weights in {self.outlier_bits} bits: a product of "
                f"integers is of two; set OutlierSplitGPTQ.outlier_bits: {self.outlier_bits}, or leave it out"
            )

    def _quantization(self, bits: int, clip_ratio: float) -> InputQuantization:
        size = GROUP_SIZES.get(self.number_format, self.group_size)
        return InputQuantization(
            bits,
            clip_ratio,
            size,
            self.sub_scale_bits,
            self.symmetric,
            self.number_format,
            self.four_over_six,
        )

    def input_words(self, group: PlacedGroup) -> str:
        """Returns what the inputs of a group become, in words; nothing where they stay as they are."""
        bits = self.words_of(group.linears[0])
        if not bits:
            return ""
        if self.number_format != "int":
            return f"{bits}, {self.number_format}"
        levels = " of two levels" if self.sub_scale_bits else ""
        grouped = f"groups of {self.group_size}{levels}" if self.group_size else "per token"
        if group.group.reads == "values" and self.o_proj_scale is not None:
            grouped = "per token and head" if self.o_proj_scale == "head" else "per token"
        return f"{bits}, {grouped}{'' if self.symmetric else ', with zero points'}"

    def words_of(self, linear: PlacedLinear) -> str:
        """Returns what becomes of an input where it may differ from others, in words; nothing if it is left alone."""
        bits = self._bits(linear.group)
        if bits is None:
            return ""
        override = override_of(self.overrides, linear)
        if override is None:
            return f"{bits} bits"
        clip = "" if override.clip_ratio is None else f" (clip ratio {override.clip_ratio:g})"
        return f"{override.bits} bits{clip}"

    def prepare(self, decoder: Decoder, batches: Batches) -> None:
        """Sets the input quantization of every linear in the decoder blocks."""
        for linear in decoder.linears():
            linear.module.input_quantization = self._quantization_of(linear, decoder.geometry.head_dim)
            if linear.module.input_quantization is not None and self.outlier_bits is not None:
                linear.module.outlier_quantization = InputQuantization(self.outlier_bits)
        logger.info(
            "DynamicActQuant: U-type inputs %s bits, D-type inputs %s bits, %s%s%s",
            self.u_type_bits,
            self.d_type_bits,
            f"per {self.strategy}" if self.number_format == "int" else self.number_format,
            " of two levels" if self.sub_scale_bits else "",
            "" if self.symmetric else ", with zero points",
        )

    def run(self, decoder: Decoder, batches: Batches) -> None:
        """Switches the quantization on, with the clip ratios chosen; the widths are final by now.

        Raises:
            ValueError: naming the first linear whose width is not a multiple of group_size.
        """
        size = GROUP_SIZES.get(self.number_format, self.group_size)
        for linear in decoder.linears():
            width = linear.module.split.residual_width
            if size is not None and width % size:
                raise ValueError(
                    f"group_size ({size}) must divide the residual width ({width}) of {linear.name}; choose a divisor"
                )
        if "auto" in (self.u_type_clip_ratio, self.d_type_clip_ratio):
            self._choose(decoder, batches)
        for linear in decoder.linears():
            linear.module.quantize_input = True

    def _quantization_of(self, linear: PlacedLinear, head_dim: int) -> InputQuantization | None:
        """A clip ratio that is to be chosen is 1 until it is."""
        bits, clip = self._bits(linear.group), self._clip_ratio(linear)
        if bits is None:
            return None
        override = override_of(self.overrides, linear)
        bits = bits if override is None else override.bits
        ratio = 1.0 if clip == "auto" else clip
        if self.o_proj_scale is not None and linear.group.reads == "values":
            group_size = head_dim if self.o_proj_scale == "head" else None
            return InputQuantization(bits, ratio, group_size, symmetric=self.symmetric)
        return self._quantization(bits, ratio)

    def _bits(self, group: Group) -> int | None:
        return self.d_type_bits if group.writes_stream else self.u_type_bits

    def _clip_ratio(self, linear: PlacedLinear) -> float | Literal["auto"]:
        override = override_of(self.overrides, linear)
        if override is not None and override.clip_ratio is not None:
            return override.clip_ratio
        return self.d_type_clip_ratio if linear.group.writes_stream else self.u_type_clip_ratio

    def _choose(self, decoder: Decoder, batches: Batches) -> None:
        found = choose_clip_ratios(
            decoder,
            batches(),
            lambda group: group.group.quantized and self._clip_ratio(group.linears[0]) == "auto",
        )
        for linear in decoder.linears():
            quantization = linear.module.input_quantization
            if quantization is not None and self._clip_ratio(linear) == "auto":
                ratio = found.get(ratio_key(linear.role, quantization), quantization.clip_ratio)
                linear.module.input_quantization = replace(quantization, clip_ratio=ratio)
        chosen = ", ".join(f"{role} {ratio:g}" for role, ratio in found.items())
        logger.info("DynamicActQuant: clip ratios of least output error: %s", chosen)
