"""Identifies the checkpoint that an adapter belongs to."""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from quad_modifiers.nn.quad_linear import QuadLinear

_WRAPPED = ".base_layer"  # PEFT's name for the layer inside of an adapted one


def base_fingerprint(model: nn.Module) -> str | None:
    """Returns a hash of a model's outlier weights and weight scales, adapters and merges left out.

    Every outlier weight depends on the projection, and after GPTQ on the calibration: another checkpoint of the same
    model has another hash. Values are hashed in bfloat16: the dtype in which the model is loaded does not matter.

    None if tensors are not in memory (offloaded or on the meta device).
    """
    digest = hashlib.sha256()
    for name, split, tensors in _layers(model):
        digest.update(f"{name} {split}".encode())
        for tensor in tensors:
            if tensor.is_meta:
                return None
            digest.update(tensor.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _layers(model: nn.Module) -> Iterator[tuple[str, str, list[torch.Tensor]]]:
    from quad_peft.layer import QuadLoraLayer

    adapted = {id(m.get_base_layer()): m for m in model.modules() if isinstance(m, QuadLoraLayer)}
    for name, module in model.named_modules():
        if not isinstance(module, QuadLinear):
            continue
        if id(module) in adapted:
            outlier, scale = adapted[id(module)].original_weights()
        else:
            outlier, scale = module.outlier_weight, module.weight_scale
        packed = module.packed_outlier
        outlier = outlier if packed is None else packed.weight_scale
        tensors = [tensor for tensor in (outlier, scale) if tensor is not None]
        yield name.removesuffix(_WRAPPED).removeprefix("base_model.model."), str(module.split), tensors
