"""The A matrix of an outlier adapter: it picks coordinates, so it needs neither memory nor a product."""

from typing import Any

import torch
from quad_kernels import InputSplit
from torch import nn

from quad_modifiers.nn.computed_weight import ComputedWeight


class OutlierSelector(nn.Module):
    """Stands in for `lora_A`, an `nn.Linear` of weight `[rank, in]` with a single number in each row.

    The dense weight exists only where others ask for it: in the state dict, and so in the saved adapter.

    `split.rank` must not be 0; A shares dtype and device of the adapter's matrix B, `lora_b`.

    Attributes:
        scale: number in each row of A, `[rank]`, float32 on the CPU: ones, or the powers of two of `equalize_outliers`.
    """

    def __init__(self, split: InputSplit, lora_b: nn.Linear) -> None:
        super().__init__()
        self.split = split
        self._lora_b = (lora_b,)  # in a tuple: no submodule of this one
        self.scale = torch.ones(split.rank, device="cpu")

    @property
    def weight(self) -> torch.Tensor:
        """The dense matrix, `[rank, in]`."""
        return ComputedWeight.of(
            self._dense(self._lora_b[0].weight.dtype, self._lora_b[0].weight.device),
            "the A of an outlier adapter picks the outlier coordinates and cannot be written to; change its B, combine "
            "adapters with add_weighted_adapter, or train a LoraConfig",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the outlier coordinates of `x` `[..., in]`, scaled, `[..., rank]`."""
        outlier, _ = self.split.divide(x)
        assert outlier is not None
        return outlier * self.scale.to(outlier)

    def extra_repr(self) -> str:
        """Shape, as `nn.Linear` gives it."""
        return f"in_features={self.split.width}, out_features={self.split.rank}"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Powers of two are exact in half the bytes of float32, and a LoRA's A and B may differ in dtype.
        destination[f"{prefix}weight"] = self._dense(torch.bfloat16, self._lora_b[0].weight.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        _metadata, _strict, missing_keys, _unexpected_keys, error_msgs = rest
        loaded = state_dict.get(f"{prefix}weight")
        if loaded is None:
            missing_keys.append(f"{prefix}weight")
            return
        try:
            self._take(loaded)
        except ValueError as error:
            error_msgs.append(f"{prefix}weight: {error}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Takes a dense matrix as `weight`, which is how transformers loads an adapter."""
        if name == "weight":
            self._take(value)
        else:
            super().__setattr__(name, value)

    def _take(self, dense: torch.Tensor) -> None:
        """Takes the scales from a dense matrix `[rank, in]` that selects the outlier coordinates."""
        if dense.is_meta:
            return
        if not torch.equal(dense != 0, self._picks(torch.bool, dense.device)):
            raise ValueError(
                f"{list(dense.shape)} does not select the {self.split.rank} outlier coordinates of an input of "
                f"{self.split.width}: the adapter belongs to another checkpoint, or was edited"
            )
        self.scale = dense.detach().sum(1).float().cpu()

    def _dense(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._picks(dtype, device) * self.scale.to(device, dtype).unsqueeze(1)

    def _picks(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The matrix that picks the outlier coordinates, `[rank, in]`."""
        dense = torch.zeros(self.split.rank, self.split.width, dtype=dtype, device=device)
        if dense.is_meta:  # while an adapter is loaded: shape and dtype are all that is asked for
            return dense
        dense[torch.arange(self.split.rank, device=device), self.split.outlier_index(device)] = 1
        return dense
