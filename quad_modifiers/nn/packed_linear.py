"""The residual weight of a loaded checkpoint: integers, never unpacked to floating point as a whole."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from quad_kernels import FloatGrid, InputQuantization, IntegerGrid, QuantizedWeight, WeightGrid, choose_backend
from quad_kernels.float4 import scale_of_stored, stored_scale
from quad_kernels.weight import SUB_SCALE_BITS
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
        grid: grid of the weight, of 2, 4 or 8 bits.
        dtype: of the scales, and of the layer; scales of floating-point numbers are stored in a dtype of their own.
        input_quantization: of the inputs, None if they stay floating point; the kernels' layout depends on it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid: WeightGrid,
        dtype: torch.dtype,
        input_quantization: InputQuantization | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.grid = grid
        self.input_quantization = input_quantization
        self._prepared: QuantizedWeight | None = None
        self.weight_packed: torch.Tensor
        shapes = packed_shapes(out_features, in_features, grid, dtype)
        for name, spec in shapes.items():
            value = torch.empty(spec.shape, dtype=spec.dtype) if spec.value is None else torch.tensor(spec.value)
            self.register_buffer(name, value)
        for name in ("weight_zero_point", "weight_sub_scale", "weight_global_scale"):
            if name not in shapes:
                self.register_buffer(name, None)
        if isinstance(grid, FloatGrid):
            self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)
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
        with torch.device(weight.scale.device):
            linear = cls(weight.in_features, weight.out_features, grid_of(weight), dtype, input_quantization)
        linear.weight_packed = weight.to_words()
        if weight.number_format != "int":
            for name, tensor in stored_scale(weight.scale.detach(), weight.number_format).items():
                setattr(linear, name, tensor)
            return linear
        linear.weight_scale = weight.scale.detach().to(dtype)
        linear.weight_zero_point, linear.weight_sub_scale = weight.zero_point_words(), weight.sub_scale_words()
        return linear

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
        if isinstance(self.grid, FloatGrid):
            return prepared
        scale = self._buffers.get("weight_scale")  # trained scales are looked up, not copied
        if scale is None:  # a parameter while it is trained
            scale = self.weight_scale
        return prepared if prepared.scale is scale else replace(prepared, scale=scale)

    def _repacked(self) -> QuantizedWeight:
        backend = choose_backend(self.weight_packed.device)
        return backend.prepare_weight(self._stored_weight(), self.input_quantization)

    def _stored_weight(self) -> QuantizedWeight:
        if isinstance(self.grid, FloatGrid):
            scale = scale_of_stored(self.weight_scale, self.weight_global_scale)
            return QuantizedWeight.of_float4(self.weight_packed, scale, self.grid.number_format)
        return QuantizedWeight.from_words(
            self.weight_packed,
            self.weight_scale,
            self.grid.bits,
            self.in_features,
            self.weight_zero_point,
            self.weight_sub_scale,
        )

    @property
    def like(self) -> torch.Tensor:
        """A tensor with the device and dtype of the layer."""
        return self._like if isinstance(self.grid, FloatGrid) else self.weight_scale

    @property
    def hidden_bytes(self) -> int:
        """Memory of the repacked weight in bytes, which is in no buffer; 0 before it is repacked."""
        prepared = self._prepared
        if prepared is None:
            return 0
        held: list[torch.Tensor | None] = [prepared.integers, prepared.zero_point, prepared.sub_scale]
        if isinstance(self.grid, FloatGrid):
            held.append(prepared.scale)
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)

    def restore_words(self) -> None:
        """Brings `weight_packed` back, in the checkpoint's layout."""
        if self._prepared is not None:
            self.weight_packed = self._prepared.to_words()
            self._prepared = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Takes other words, zero points or sub-scales even after a forward pass, which has repacked the former."""
        if self.__dict__.get("_prepared") is not None:
            if name == "weight_packed":
                self._prepared = None
            elif name in ("weight_zero_point", "weight_sub_scale", "weight_global_scale") or (
                name == "weight_scale" and isinstance(self.grid, FloatGrid)
            ):
                self.restore_words()
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedLinear":
        self.restore_words()  # another device may want another layout
        kept = self._float_scales()
        super()._apply(fn, recurse)
        for name, scale in kept.items():
            setattr(self, name, scale.to(self._buffers[name].device))
        return self

    def _float_scales(self) -> dict[str, torch.Tensor]:
        """Scales whose dtype is that of their format, whatever the layer's becomes."""
        if not isinstance(self.grid, FloatGrid):
            return {}
        scales = {name: self._buffers.get(name) for name in ("weight_scale", "weight_global_scale")}
        return {name: scale for name, scale in scales.items() if scale is not None and not scale.is_meta}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the kernels' layouts cannot be copied."""
        self.restore_words()
        return super().__getstate__()

    def quantized_weight(self) -> QuantizedWeight:
        """Returns the weight in layout int8."""
        if self._prepared is not None:
            held = self._prepared.unfolded()
            return held if isinstance(self.grid, FloatGrid) else replace(held, scale=self.weight_scale)
        return self._stored_weight()

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight as floating point, `[out, in]`."""
        return self.quantized_weight().dequantized(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the dequantized weight to floating-point inputs `[..., in]` (weight-only quantization)."""
        return nn.functional.linear(x, self.prepared_weight().dequantized(x.dtype))

    def extra_repr(self) -> str:
        """Shape, format and the backend that runs it."""
        backend = "" if self.weight_scale.is_meta else f", kernels={choose_backend(self.weight_scale.device).name}"
        grid = f"bits={self.grid.bits}, group_size={self.grid.group_size}"
        if self.grid.sub_scale_bits is not None:
            grid += f", sub_scale_bits={self.grid.sub_scale_bits}"
        return f"in={self.in_features}, out={self.out_features}, {grid}{backend}"


def grid_of(weight: QuantizedWeight) -> WeightGrid:
    """Returns the grid of a weight."""
    if weight.number_format != "int":
        return FloatGrid(weight.number_format)
    groups = weight.scale.shape[1] if weight.sub_scale is None else len(weight.sub_scale)
    size = None if groups == 1 and weight.sub_scale is None else weight.in_features // groups
    return IntegerGrid(
        weight.stored_bits, size, weight.zero_point is None, None if weight.sub_scale is None else SUB_SCALE_BITS
    )


def _is_offloaded(module: nn.Module) -> bool:
    """True if accelerate takes the module's buffers away after each use."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(part, "offload_buffers", False) for part in getattr(hook, "hooks", (hook,)))


def _restore_words(module: Any, *_: Any) -> None:
    module.restore_words()
