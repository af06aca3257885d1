"""DynamicActQuant: integer quantization of the inputs of the linears, at run time."""

import logging
from typing import ClassVar, Literal

from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import Field, model_validator

from quad_modifiers.modifiers.preparation import prepare_model
from quad_modifiers.nn.input_split import InputQuantization
from quad_modifiers.nn.quad_linear import QuadLinear

logger = logging.getLogger(__name__)


class DynamicActQuant(Modifier):
    """Quantizes the residual part of each linear's input with scales taken from the input itself.

    The outlier coordinates bypass it (QUAD, arXiv 2503.19353, section 3.3). U-type linears read the residual stream
    (q, k, v, gate, up), D-type linears write it (o_proj, down_proj); "W4A4/A8" is 4 bits for the former, 8 for the
    latter.

    Lifecycle:

    - on_initialize
        - wrap the linears, set their input quantization
    - on_calibration_start
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

    recipe_role: ClassVar[str] = "quantize_activations"

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

    def on_initialize(self, state: State, **kwargs: object) -> bool:
        """Sets the input quantization of every linear in the decoder blocks."""
        architecture = prepare_model(state.model)
        for module in state.model.modules():
            if isinstance(module, QuadLinear):
                is_d_type = module.role in architecture.d_type
                bits = self.d_type_bits if is_d_type else self.u_type_bits
                clip = self.d_type_clip_ratio if is_d_type else self.u_type_clip_ratio
                module.input_quantization = None if bits is None else InputQuantization(bits, clip, self.group_size)
        logger.info(
            "DynamicActQuant: U-type inputs %s bits, D-type inputs %s bits, per %s",
            self.u_type_bits,
            self.d_type_bits,
            self.strategy,
        )
        return True

    def on_calibration_start(self, state: State, event: object, **kwargs: object) -> None:
        """Switches the quantization on; the widths are final by now.

        Raises:
            ValueError: naming the first linear whose width is not a multiple of group_size.
        """
        for name, module in state.model.named_modules():
            if not isinstance(module, QuadLinear):
                continue
            module.take_bias()
            module.quantize_input = True
            if self.group_size is not None and module.split.residual_width % self.group_size:
                raise ValueError(
                    f"group_size ({self.group_size}) must divide the residual width ({module.split.residual_width}) "
                    f"of {name}; choose a divisor"
                )
