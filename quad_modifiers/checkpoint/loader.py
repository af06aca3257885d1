"""Loads QUAD checkpoints through transformers' quantizer interface; llm-compressor is not needed."""

import logging
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer, auto
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from quad_modifiers.checkpoint.dequantize import dequantize_model
from quad_modifiers.checkpoint.format import QUANT_METHOD, LinearFormat, QuadFormat, read_format
from quad_modifiers.checkpoint.models import quad_model_type, register_models
from quad_modifiers.checkpoint.opened import stored_architecture
from quad_modifiers.checkpoint.tables import install_tables
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder, PlacedLinear
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.packed_table import PackedTable
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.plugins import architectures

logger = logging.getLogger(__name__)

_LISTED = 5  # tensors named in one error message


class QuadQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a QUAD checkpoint, kept as it was read.

    Args:
        dequantize: load as a plain model of the same function, its inputs unquantized; for `from_pretrained(...,
            quantization_config=QuadQuantizationConfig(dequantize=True))`.
        content: the section of config.json.
    """

    def __init__(self, dequantize: bool = False, **content: Any) -> None:
        self.quant_method = QUANT_METHOD  # a plain string: transformers' enum is closed
        self.dequantize = dequantize
        self.content = {key: value for key, value in content.items() if key != "quant_method"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Keeps every key."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def get_loading_attributes(self) -> dict[str, Any]:
        """What `from_pretrained` takes over from a config that it is given."""
        return {"dequantize": self.dequantize}

    def to_dict(self) -> dict[str, Any]:
        """The section of config.json."""
        return {"quant_method": QUANT_METHOD, **self.content}


class QuadHfQuantizer(HfQuantizer):
    """Puts the containers of a QUAD checkpoint in place of a stock model's linears and checks every tensor."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        quad = read_format(self.quantization_config.content.get("quad"))
        architecture = _architecture(model, quad)
        decoder = Decoder(model, architecture)
        for linear in decoder.linears():
            _install(linear, quad)
        install_tables(decoder, quad)
        files = kwargs.get("checkpoint_files")
        if files:
            check_tensors(model, files)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, module in model.named_modules():
            if not isinstance(module, (PackedLinear, PackedTable)) or module.weight_scale.is_meta:
                continue
            scale = module.weight_scale
            if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
                raise ValueError(
                    f"{name}.weight_scale holds NaN, infinite or negative values; the checkpoint is damaged"
                )
            if isinstance(module, PackedTable):
                shape = [module.rows, module.columns]
            else:
                shape = [module.out_features, module.in_features]
            if module.weight_shape.tolist() != shape:
                raise ValueError(
                    f"{name}.weight_shape says {module.weight_shape.tolist()}, config.json says {shape}; the "
                    "checkpoint is damaged"
                )
        if self.quantization_config.dequantize:
            self._dequantize(model)
            return
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.prepare()  # now, not at the first request: unpacking takes memory

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        quad = read_format(self.quantization_config.content.get("quad"))
        return dequantize_model(model, stored_architecture(quad), dtype)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A loaded model can be saved again as it is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train on the outlier weights; the packed weights stay."""
        return True


def _architecture(model: nn.Module, quad: QuadFormat) -> Architecture:
    architecture = stored_architecture(quad)
    if model.config.model_type != quad_model_type(quad.base_model_type):
        raise ValueError(
            f"the checkpoint's base model type is {quad.base_model_type!r}, but it is being loaded as "
            f"{type(model).__name__}; use AutoModelForCausalLM"
        )
    return architecture


def _install(place: PlacedLinear, quad: QuadFormat) -> None:
    role = place.role
    linear: LinearFormat | None = quad.linears.get(role)
    if linear is None:
        raise ValueError(f"the checkpoint does not describe {role}; its quantization_config is damaged")
    old = place.module
    dtype, device = old.weight.dtype, old.weight.device
    split, quantization = linear.split(), None if linear.input is None else linear.input.settings()
    with torch.device(device):
        residual: nn.Module
        if linear.weight is None:
            residual = nn.Linear(split.residual_width, linear.out_features, bias=False, dtype=dtype)
        else:
            weight = linear.weight
            residual = PackedLinear(
                split.residual_width,
                linear.out_features,
                weight.bits,
                weight.group_size,
                weight.symmetric,
                dtype,
                quantization,
            )
        container = QuadLinear.from_parts(role, split, residual, linear.bias, dtype)
    container.input_quantization = quantization
    container.quantize_input = quantization is not None
    container.requires_grad_(False)
    place.replace(container)


def check_tensors(model: nn.Module, files: list[str]) -> None:
    """Compares the tensors in safetensors files with those the model needs, by name, shape and kind of number.

    Raises:
        ValueError: naming missing, surplus and mis-shaped tensors.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (no mapping)
                    part = handle.get_slice(name)
                    found[name] = tuple(part.get_shape()), part.get_dtype()
        except Exception as error:
            raise ValueError(f"{file} cannot be read as safetensors ({error}); download it again") from error
    needed = {name: tensor for name, tensor in model.state_dict().items() if name not in _tied(model)}
    problems = [f"{name} is missing" for name in needed if name not in found]
    problems += [
        f"{name} is not part of the model" for name in found if name not in needed and name not in _tied(model)
    ]
    for name in needed.keys() & found.keys():
        shape, kind = found[name]
        if shape != tuple(needed[name].shape):
            problems.append(f"{name} has shape {list(shape)}, needed is {list(needed[name].shape)}")
        elif not _fits(kind, needed[name]):
            problems.append(f"{name} has dtype {kind}, needed is {needed[name].dtype}")
    if problems:
        more = f" and {len(problems) - _LISTED} more problems" if len(problems) > _LISTED else ""
        raise ValueError(f"the checkpoint does not fit its config: {'; '.join(sorted(problems)[:_LISTED])}{more}")


def _fits(kind: str, needed: torch.Tensor) -> bool:
    """Floating point is cast to the model's dtype; integers are words of bits and must be of the right width."""
    if needed.is_floating_point():
        return kind.startswith(("F", "BF"))
    return kind == f"I{8 * needed.element_size()}"


def _tied(model: nn.Module) -> set[str]:
    """Names of tensors that a tied model shares and its checkpoint leaves out."""
    return set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()


def register_loader() -> None:
    """Registers the quantizer and the model classes with transformers; calling it again changes nothing."""
    register_models(sorted(architectures()))
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(QuadQuantizationConfig)
        register_quantizer(QUANT_METHOD)(QuadHfQuantizer)
        # Without this, `from_pretrained` would warn and go on with the config of the checkpoint alone.
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (QuadQuantizationConfig,)
