"""The residual weight of a loaded checkpoint: integers, never unpacked to floating point as a whole."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from quad_kernels import InputQuantization, QuantizedWeight, choose_backend, prepare_weight
from quad_kernels.packing import unpack_int32
from torch import nn

from quad_modifiers.nn.quad_linear import IntegerWeight


class PackedLinear(nn.Module):
    """A quantized linear without bias that holds its weight in integers.

    It is loaded, moved and saved in the checkpoint's layout (buffers `weight_packed`, ...). The first forward pass, or
    `prepare`, repacks it for the kernels of the device it lies on, and frees the checkpoint's words; `state_dict`, `to`
    and `integer_weight` bring them back. The integers are the same in both.

    Args:
        in_features: input width.
        out_features: output channels.
        bits: 2, 4 or 8.
        group_size: input coordinates per scale, None for one scale per output channel.
        symmetric: False for a zero point per scale.
        dtype: of the scales.
        input_quantization: of the inputs, None if they stay floating point; the kernels' layout depends on it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int | None,
        symmetric: bool,
        dtype: torch.dtype,
        input_quantization: InputQuantization | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.input_quantization = input_quantization
        groups = 1 if group_size is None else in_features // group_size
        per_word = 32 // bits
        self._prepared: QuantizedWeight | None = None
        self.weight_packed: torch.Tensor
        self.register_buffer("weight_packed", torch.empty(out_features, -(-in_features // per_word), dtype=torch.int32))
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=dtype))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], dtype=torch.int64))
        zero_point = None if symmetric else torch.empty(-(-out_features // per_word), groups, dtype=torch.int32)
        self.register_buffer("weight_zero_point", zero_point)
        self.register_state_dict_pre_hook(_restore_words)

    def prepare(self) -> None:
        """Repacks the weight for the kernels of its device; does nothing while its tensors are not loaded."""
        if self._prepared is None and not self.weight_packed.is_meta:
            self._prepared = self._repacked()
            self.weight_packed = self.weight_packed.new_empty(0)

    def prepared_weight(self) -> QuantizedWeight:
        """The weight as the kernels read it."""
        if self._prepared is None:
            if _is_offloaded(self):  # the tensors come for one forward pass and go again
                return self._repacked()
            self.prepare()
        assert self._prepared is not None
        scale = self.weight_scale  # trained scales are looked up, not copied
        return self._prepared if self._prepared.scale is scale else replace(self._prepared, scale=scale)

    def _repacked(self) -> QuantizedWeight:
        return prepare_weight(
            self.weight_packed,
            self.weight_scale,
            bits=self.bits,
            in_features=self.in_features,
            quantization=self.input_quantization,
            zero_point=self.weight_zero_point,
        )

    def restore_words(self) -> None:
        """Brings `weight_packed` back, in the checkpoint's layout."""
        if self._prepared is not None:
            self.weight_packed = self._prepared.to_words()
            self._prepared = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedLinear":
        self.restore_words()  # another device may want another layout
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the kernels' layouts cannot be copied."""
        self.restore_words()
        return super().__getstate__()

    def integer_weight(self) -> IntegerWeight:
        """Unpacks the weight; integers `[out, in]`, int8."""
        if self._prepared is not None:
            return IntegerWeight(self._prepared.unpacked(), self.weight_scale, self._prepared.zero_point)
        zero_point = None
        if self.weight_zero_point is not None:
            zero_point = unpack_int32(self.weight_zero_point.T, self.bits, self.out_features).T
        integers = unpack_int32(self.weight_packed, self.bits, self.in_features)
        return IntegerWeight(integers, self.weight_scale, zero_point)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight as floating point, `[out, in]`."""
        integers, scale, zero_point = self.integer_weight()
        weight = QuantizedWeight(integers, scale, zero_point, self.in_features, self.out_features, self.bits)
        return weight.dequantized(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the dequantized weight to floating-point inputs `[..., in]` (weight-only quantization)."""
        return nn.functional.linear(x, self.prepared_weight().dequantized(x.dtype))

    def extra_repr(self) -> str:
        """Shape, format and the backend that runs it."""
        backend = "" if self.weight_scale.is_meta else f", kernels={choose_backend(self.weight_scale.device).name}"
        return (
            f"in={self.in_features}, out={self.out_features}, bits={self.bits}, group_size={self.group_size}{backend}"
        )


def _is_offloaded(module: nn.Module) -> bool:
    """True if accelerate takes the module's buffers away after each use."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload_buffers", False) for part in getattr(hook, "hooks", (hook,)))


def _restore_words(module: Any, prefix: str, keep_vars: bool) -> None:
    module.restore_words()
