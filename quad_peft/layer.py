"""PEFT's layer around a `QuadLinear`: outlier adapters without a product of their own, and any plain LoRA."""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from quad_kernels import FloatGrid, QuantizedWeight
from torch import nn

from quad_modifiers.nn.forward import LinearParts, changed_outlier_weight, changed_weight_scale, linear_forward
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_peft.config import OutlierLoraConfig
from quad_peft.integer_change import ChangedWeight, IntegerChanges, stored
from quad_peft.selector import OutlierSelector

PACKED_OUTLIER = (
    "the outlier weights of this checkpoint are 8-bit integers, which no adapter can change; compress without "
    "outlier_bits, or train a plain LoraConfig and serve it unmerged"
)


class QuadLoraLayer(nn.Module, LoraLayer):
    """LoRA on a `QuadLinear`.

    An outlier adapter (`OutlierLoraConfig`) changes the outlier weight, with `train_weight_scales` the scales of the
    residual weight, and with `train_weights` its integers; the changes are added before the layer runs. Any other LoRA
    adds `B A x` to the result.

    Args:
        base_layer: layer to adapt; its own parameters stay as they are.
        adapter_name: name of the first adapter.
        config: config of that adapter.
        r: rank of the adapter.
        lora_alpha: alpha of the adapter.

    Attributes:
        stored_dtype: dtype of the checkpoint that the adapter will be merged into, if that is narrower than the
            model's: changed outlier weights and scales are rounded to it. None rounds to the model's dtype alone.

    Raises:
        ValueError: if the rank of an outlier adapter is not that of the layer.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_weight_scale", "lora_integer_change")

    def __init__(
        self,
        base_layer: QuadLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.lora_weight_scale = nn.ParameterDict()
        self.lora_integer_change = IntegerChanges()
        self._changed_weight = ChangedWeight()
        self.stored_dtype: torch.dtype | None = None
        self._before_merging: tuple[torch.Tensor | None, ...] | None = None
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Adds an adapter; see `LoraLayer.update_layer`."""
        if not isinstance(config, OutlierLoraConfig):
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            return
        base = self.get_base_layer()
        if r != base.split.rank:
            raise ValueError(f"the adapter has rank {r}, but {base.role} has {base.split.rank} outlier coordinates")
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_bias[adapter_name] = self.use_rslora[adapter_name] = self.use_dora[adapter_name] = False
        change = nn.Linear(r, self.out_features, bias=False)
        if config.init_lora_weights:
            nn.init.zeros_(change.weight)
        self.lora_B[adapter_name] = change
        if config.train_weight_scales:
            self.lora_weight_scale[adapter_name] = nn.Parameter(torch.zeros(self._weight_scale().shape))
        if config.train_weights:
            shape = (self.out_features, self._packed("integers").in_features)
            self.lora_integer_change[adapter_name] = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.lora_A[adapter_name] = OutlierSelector(base.split, self.lora_B[adapter_name])
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Applies the layer with its active adapters to `[..., in]`."""
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x)
        if adapter_names is not None:
            for changes, what in ((self.lora_weight_scale, "weight scales"), (self.lora_integer_change, "integers")):
                found = next((name for name in adapter_names if name in changes), None)
                if found is not None:
                    raise ValueError(f"adapter {found!r} changes {what} and cannot share a batch; merge it")
            return self._mixed_batch_forward(x, adapter_names=adapter_names)
        names = [name for name in self.active_adapters if name in self.lora_A]
        with self.base_layer.present() as parts:
            result = linear_forward(x, self._changed(parts, [name for name in names if self._is_outlier(name)]))
        for name in names:
            if not self._is_outlier(name):
                inner = self.lora_dropout[name](self._cast_input_dtype(x, self.lora_A[name].weight.dtype))
                result = result + self.lora_B[name](self.lora_A[name](inner)) * self.scaling[name]
        return result.to(x.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the outlier weight, the weight scales and the integers.

        Args:
            safe_merge: True to check the result for NaN first.
            adapter_names: adapters to merge; the active ones by default.

        Raises:
            ValueError: for an adapter that changes more than the outlier weight, or with `safe_merge` NaN.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        if base.packed_outlier is not None:
            raise ValueError(f"nothing can be merged into {base.role}: {PACKED_OUTLIER}")
        with torch.no_grad():
            outlier, scale = self._changes(names)
            merged = base.outlier_weight
            if merged is not None and outlier is not None:
                merged = changed_outlier_weight(merged, outlier)
            merged_scale = None if scale is None else changed_weight_scale(self._weight_scale(), scale)
            integers = self._integer_changes(names)
            words = stored(self._packed("integers"), integers).to_words() if integers else None
        for tensor in (merged, merged_scale):
            if safe_merge and tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"the adapters {', '.join(names)} hold NaN or infinite values; nothing was merged")
        if self._before_merging is None:
            before = None if base.outlier_weight is None else base.outlier_weight.data
            self._before_merging = before, None if merged_scale is None else self._weight_scale(), None
        if words is not None and self._before_merging[2] is None:
            self._before_merging = *self._before_merging[:2], self._packed("integers").quantized_weight().to_words()
        self._set(merged, merged_scale, words)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the weights from before the merge, bit for bit."""
        if self._before_merging is not None:
            self._set(*self._before_merging)
            self._before_merging = None
        self.merged_adapters.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuadLoraLayer":
        if self._before_merging is not None:  # moves and casts with what it will replace
            self._before_merging = tuple(None if tensor is None else fn(tensor) for tensor in self._before_merging)
        return super()._apply(fn, recurse)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Returns the change as a dense matrix over the layer's input, `[out, in]`."""
        return self.scaling[adapter] * (self.lora_B[adapter].weight @ self.lora_A[adapter].weight)

    def original_weights(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Outlier weight and weight scale as they are without any merged adapter."""
        base, scale = self.get_base_layer(), self._weight_scale()
        if self._before_merging is None:
            return base.outlier_weight, scale
        outlier, before, _ = self._before_merging
        return outlier, scale if before is None else before

    def outlier_change(self, name: str) -> torch.Tensor:
        """Returns what an adapter adds to the outlier weight, `[out, rank]`, float32.

        Raises:
            ValueError: if it changes more than that.
        """
        change = self.lora_B[name].weight.float() * self.scaling[name]
        if self._is_outlier(name):
            return change * self.lora_A[name].scale.to(change.device)
        first, columns = self.lora_A[name].weight.float(), self.get_base_layer().split.outlier_index()
        rest = torch.ones(self.in_features, dtype=torch.bool)
        rest[columns] = False
        if bool(first[:, rest.to(first.device)].any()) or self.lora_bias[name]:
            raise ValueError(
                f"adapter {name!r} changes more than the outlier weights of {self.get_base_layer().role}, and 4-bit "
                "weights cannot take that up; serve it unmerged, or train an OutlierLoraConfig"
            )
        return change @ first[:, columns.to(first.device)]

    def scale_change(self, name: str) -> torch.Tensor:
        """Returns what an adapter that has weight scales adds to those of the residual, `[out, groups]`, float32."""
        change: torch.Tensor = self.lora_weight_scale[name].float() * self.scaling[name]
        return change

    def _changed(self, parts: LinearParts, names: list[str]) -> LinearParts:
        """Returns the parts with the changes of outlier adapters."""
        integers = self._integer_changes(names)
        if integers:
            weight = self._changed_weight.of(self._packed("integers"), integers)
            trained = sum(integers[1:], integers[0])
            parts = parts._replace(residual=replace(weight, scale=self._weight_scale()), integers_like=trained)
        outlier, scale = self._changes(names)
        parts = parts.with_change(outlier, scale)
        if self.stored_dtype is None:
            return parts
        if outlier is not None and parts.outlier_weight is not None:
            parts = parts._replace(outlier_weight=_rounded(parts.outlier_weight, self.stored_dtype))
        if scale is not None:
            assert isinstance(parts.residual, QuantizedWeight)
            scale = _rounded(parts.residual.scale, self.stored_dtype)
            parts = parts._replace(residual=replace(parts.residual, scale=scale))
        return parts

    def _integer_changes(self, names: list[str]) -> list[torch.Tensor]:
        return [self.lora_integer_change[name] for name in names if name in self.lora_integer_change]

    def _packed(self, what: str) -> PackedLinear:
        residual = self.get_base_layer().residual
        if not isinstance(residual, PackedLinear):
            raise ValueError(f"{self.get_base_layer().role} has no quantized weight, so it has no {what} to train")
        if isinstance(residual.grid, FloatGrid):
            raise ValueError(
                f"{self.get_base_layer().role} has numbers of {residual.grid.number_format}, whose {what} are not "
                "trained; train its outliers"
            )
        return residual

    def _set(self, outlier: torch.Tensor | None, scale: torch.Tensor | None, words: torch.Tensor | None) -> None:
        base = self.get_base_layer()
        if base.outlier is not None and outlier is not None:
            base.outlier.weight.data = outlier
        if scale is not None:
            base.residual.weight_scale = scale
        if words is not None:
            base.residual.weight_packed = words

    def _weight_scale(self) -> torch.Tensor:
        scale: torch.Tensor = self._packed("scales").weight_scale
        return scale

    def _is_outlier(self, name: str) -> bool:
        return isinstance(self.lora_A[name], OutlierSelector)

    def _changes(self, names: list[str]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Sums of the adapters' changes in float32: outlier weight `[out, rank]`, weight scale `[out, groups]`."""
        outliers = [self.outlier_change(name) for name in names]
        scales = [self.scale_change(name) for name in names if name in self.lora_weight_scale]
        return reduce(torch.add, outliers) if outliers else None, reduce(torch.add, scales) if scales else None

    def _get_in_out_features(self, module: QuadLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def __repr__(self) -> str:
        """Marks the layer as PEFT marks its own."""
        return f"lora.{super().__repr__()}"


def _rounded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds to another dtype and comes back; the gradient passes as it is."""
    return tensor.to(dtype).to(tensor.dtype)
