"""DynamicActQuant: integer quantization of the inputs of the linears, at run time."""

import logging
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from quad_kernels import InputQuantization

from quad_modifiers.model.decoder import Decoder
from quad_modifiers.modifiers.base import Batches, QuadModifier

logger = logging.getLogger(__name__)


class DynamicActQuant(QuadModifier):
    """Quantizes the residual part of each linear's input with scales taken from the input itself.

    The outlier coordinates bypass it (QUAD, arXiv 2503.19353, section 3.3). U-type linears read the residual stream
    (q, k, v, gate, up), D-type linears write it (o_proj, down_proj); "W4A4/A8" is 4 bits for the former, 8 for the
    latter.

    Lifecycle:

    - prepare
        - set the input quantization of the linears
    - run
        - check the group size against the final widths
        - switch the quantization on

    Attributes:
        u_type_bits: bits of U-type inputs, None leaves them unquantized.
        d_type_bits: bits of D-type inputs, None leaves them unquantized.
        strategy: one scale per "token", or per "group" of a token.
        group_size: coordinates per scale for strategy "group".
        u_type_clip_ratio, d_type_clip_ratio: share of the largest magnitude that the grid covers; 1.0 is the grid of
            compressed-tensors, the paper's 0.9 of absmax / 7 is 0.964.
    """

    recipe_role: ClassVar[str | None] = "quantize_activations"
    has_own_pass: ClassVar[bool] = False

    u_type_bits: int | None = Field(default=4, ge=2, le=8)
    d_type_bits: int | None = Field(default=4, ge=2, le=8)
    strategy: Literal["token", "group"] = "token"
    group_size: int | None = Field(default=None, ge=8)
    u_type_clip_ratio: float = Field(default=0.92, gt=0.3, le=1.0)
    d_type_clip_ratio: float = Field(default=0.92, gt=0.3, le=1.0)

    @model_validator(mode="after")
    def _check_group(self) -> "DynamicActQuant":
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError(
                f"group_size ({self.group_size}) goes with strategy 'group' and only with it (strategy is "
                f"{self.strategy!r})"
            )
        return self

    def prepare(self, decoder: Decoder, batches: Batches) -> None:
        """Sets the input quantization of every linear in the decoder blocks."""
        for linear in decoder.linears():
            writes = linear.group.writes_stream
            bits = self.d_type_bits if writes else self.u_type_bits
            clip = self.d_type_clip_ratio if writes else self.u_type_clip_ratio
            quantization = None if bits is None else InputQuantization(bits, clip, self.group_size)
            linear.module.input_quantization = quantization
        logger.info(
            "DynamicActQuant: U-type inputs %s bits, D-type inputs %s bits, per %s",
            self.u_type_bits,
            self.d_type_bits,
            self.strategy,
        )

    def run(self, decoder: Decoder, batches: Batches) -> None:
        """Switches the quantization on; the widths are final by now.

        Raises:
            ValueError: naming the first linear whose width is not a multiple of group_size.
        """
        for linear in decoder.linears():
            width = linear.module.split.residual_width
            linear.module.quantize_input = True
            if self.group_size is not None and width % self.group_size:
                raise ValueError(
                    f"group_size ({self.group_size}) must divide the residual width ({width}) of {linear.name}; choose "
                    "a divisor"
                )
