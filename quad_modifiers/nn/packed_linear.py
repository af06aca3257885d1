"""The residual weight of a loaded checkpoint: integers, never unpacked to floating point as a whole."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from quad_kernels import InputQuantization, QuantizedWeight, choose_backend, prepare_weight
from torch import nn

from quad_modifiers.nn.packed_shapes import packed_shapes, refuse_other_shape


class PackedLinear(nn.Module):
    """A quantized linear without bias that holds its weight in integers.

    It is loaded, moved and saved in the checkpoint's layout (buffers `weight_packed`, ...). The first forward pass, or
    `prepare`, repacks it for the kernels of its device and frees the checkpoint's words; `state_dict`,
    `load_state_dict` and `to` bring them back. The integers are the same in both.

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
        self._prepared: QuantizedWeight | None = None
        self.weight_packed: torch.Tensor
        shapes = packed_shapes(out_features, in_features, bits, group_size, symmetric, dtype)
        for name, spec in shapes.items():
            value = torch.empty(spec.shape, dtype=spec.dtype) if spec.value is None else torch.tensor(spec.value)
            self.register_buffer(name, value)
        if symmetric:
            self.register_buffer("weight_zero_point", None)
        self.register_state_dict_pre_hook(_restore_words)
        self.register_load_state_dict_pre_hook(_restore_words)
        self.register_load_state_dict_pre_hook(refuse_other_shape)

    @classmethod
    def of(
        cls, weight: QuantizedWeight, dtype: torch.dtype, input_quantization: InputQuantization | None = None
    ) -> "PackedLinear":
        """Returns a linear of a quantized weight.

        Args:
            weight: in any layout.
            dtype: of the scales.
            input_quantization: of the inputs, None if they stay floating point.
        """
        groups = weight.scale.shape[1]
        group_size = None if groups == 1 else weight.in_features // groups
        with torch.device(weight.scale.device):
            linear = cls(
                weight.in_features,
                weight.out_features,
                weight.bits,
                group_size,
                weight.zero_point is None,
                dtype,
                input_quantization,
            )
        linear.weight_packed, linear.weight_scale = weight.to_words(), weight.scale.detach().to(dtype)
        linear.weight_zero_point = weight.zero_point_words()
        return linear

    @property
    def symmetric(self) -> bool:
        """True without zero points."""
        return self.weight_zero_point is None

    def prepare(self) -> None:
        """Repacks the weight for the kernels of its device; does nothing while its tensors are not loaded."""
        if self._prepared is None and not self.weight_packed.is_meta:
            repacked = self._repacked()
            self.weight_packed = self.weight_packed.new_empty(0)
            self._prepared = repacked

    def prepared_weight(self) -> QuantizedWeight:
        """The weight as the kernels read it."""
        prepared = self._prepared
        if prepared is None:
            if _is_offloaded(self):  # the tensors come for one forward pass and go again
                return self._repacked()
            self.prepare()
            prepared = self._prepared
            assert prepared is not None
        scale = self._buffers.get("weight_scale")  # trained scales are looked up, not copied
        if scale is None:  # a parameter while it is trained
            scale = self.weight_scale
        return prepared if prepared.scale is scale else replace(prepared, scale=scale)

    def _repacked(self) -> QuantizedWeight:
        return prepare_weight(
            self.weight_packed,
            self.weight_scale,
            bits=self.bits,
            in_features=self.in_features,
            quantization=self.input_quantization,
            zero_point=self.weight_zero_point,
        )

    @property
    def hidden_bytes(self) -> int:
        """Memory of the repacked weight in bytes, which is in no buffer; 0 before it is repacked."""
        prepared = self._prepared
        if prepared is None:
            return 0
        held = [prepared.integers] if prepared.zero_point is None else [prepared.integers, prepared.zero_point]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def restore_words(self) -> None:
        """Brings `weight_packed` back, in the checkpoint's layout."""
        if self._prepared is not None:
            self.weight_packed = self._prepared.to_words()
            self._prepared = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Takes other words or zero points even after a forward pass, which has repacked those from before."""
        if self.__dict__.get("_prepared") is not None:
            if name == "weight_packed":
                self._prepared = None
            elif name == "weight_zero_point":
                self.restore_words()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedLinear":
        self.restore_words()  # another device may want another layout
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the kernels' layouts cannot be copied."""
        self.restore_words()
        return super().__getstate__()

    def quantized_weight(self) -> QuantizedWeight:
        """Returns the weight in layout int8."""
        if self._prepared is not None:
            return replace(self._prepared.to_layout("int8"), scale=self.weight_scale)
        return QuantizedWeight.from_words(
            self.weight_packed, self.weight_scale, self.bits, self.in_features, self.weight_zero_point
        )

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight as floating point, `[out, in]`."""
        return self.quantized_weight().dequantized(dtype)

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


def _restore_words(module: Any, *_: Any) -> None:
    module.restore_words()
