"""Loads QUAD checkpoints through transformers' quantizer interface; llm-compressor is not needed."""

import ctypes
import logging
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, auto
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from quad_modifiers.checkpoint.dequantize import dequantize_model
from quad_modifiers.checkpoint.format import QUANT_METHOD, QuadFormat, read_format
from quad_modifiers.checkpoint.installed_sections import install_sections, lasting_sections
from quad_modifiers.checkpoint.models import publish_by, quad_model_type, register_models
from quad_modifiers.checkpoint.native_runtime import use_native_blocks
from quad_modifiers.checkpoint.opened import stored_architecture
from quad_modifiers.checkpoint.tables import install_tables
from quad_modifiers.checkpoint.tensors import (
    format_of,
    model_tensors,
    refuse,
    tensor_problem,
    tied_names,
    value_problem,
)
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder, PlacedLinear
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.packed_shapes import TensorSpec
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.plugins import architectures
from quad_modifiers.plugins.checkpoint_parts import load_term
from quad_modifiers.records.checksums import verify_loading
from quad_modifiers.records.inventory import read_header

logger = logging.getLogger(__name__)


class QuadQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a QUAD checkpoint, kept as it was read.

    Args:
        dequantize: load as a plain model of the same function, its inputs unquantized; for `from_pretrained(...,
            quantization_config=QuadQuantizationConfig(dequantize=True))`.
        content: the section of config.json.

    Raises:
        TypeError: for an argument that is neither `dequantize` nor part of such a section.
    """

    def __init__(self, dequantize: bool = False, **content: Any) -> None:
        if content and "quad" not in content:
            raise TypeError(f"QuadQuantizationConfig takes `dequantize`, not {', '.join(content)}")
        self.quant_method = QUANT_METHOD  # a plain string: transformers' enum is closed
        self.dequantize = dequantize
        self.content = {key: value for key, value in content.items() if key != "quant_method"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Keeps every key."""
        config = cls(bool(config_dict.get("dequantize", False)))
        ours = ("quant_method", "dequantize")
        config.content = {key: value for key, value in config_dict.items() if key not in ours}
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
    _expected: dict[str, TensorSpec]

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        quad = read_format(self.quantization_config.content.get("quad"))
        architecture = _architecture(model, quad)
        decoder = Decoder(model, architecture)
        install_sections(decoder, quad)
        self._expected = model_tensors(decoder, quad)
        for linear in decoder.linears():
            _install(linear, quad)
        install_tables(decoder, quad)
        files = kwargs.get("checkpoint_files")
        if files:
            verify_loading(Path(files[0]).parent)
            check_tensors(self._expected, files, tied_names(model))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for name, spec in self._expected.items():
            if name.endswith((".weight_scale", ".weight_global_scale", ".weight_shape")):  # what no header tells
                owner, _, leaf = name.rpartition(".")
                tensor = getattr(model.get_submodule(owner), leaf)  # a term may hold a parameter of this name
                problem = None if tensor.is_meta else value_problem(name, tensor, spec)
                if problem is not None:
                    raise ValueError(f"{problem}; the checkpoint is damaged")
        if self.quantization_config.dequantize:
            self._dequantize(model)
            return
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.prepare()  # now, not at the first request: unpacking takes memory
        _return_freed_memory()
        quad = read_format(self.quantization_config.content.get("quad"))
        decoder = Decoder(model, _architecture(model, quad))
        use_native_blocks(decoder)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        if isinstance(dtype, str):  # a model that was saved has the name in its config
            dtype = getattr(torch, dtype)
        quad = read_format(self.quantization_config.content.get("quad"))
        lasting = lasting_sections(quad)
        if lasting:
            raise ValueError(f"a model with {', '.join(lasting)} has no plain form; load it without dequantize")
        return dequantize_model(model, stored_architecture(quad), dtype, quad)

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
    role, linear, old = place.role, format_of(quad, place), place.module
    dtype, device = old.weight.dtype, old.weight.device
    split, quantization = linear.split(), None if linear.input is None else linear.input.settings()
    with torch.device(device):
        residual: nn.Module
        if linear.weight is None:
            residual = nn.Linear(split.residual_width, linear.out_features, bias=False, dtype=dtype)
        else:
            grid = linear.weight.grid()
            residual = PackedLinear(split.residual_width, linear.out_features, grid, dtype, quantization)
        container = QuadLinear(residual, role, split)
        container.outlier_quantization = None if linear.outlier is None else linear.outlier.input_settings()
        container.allocate(linear.bias, dtype, linear.outlier is not None)
        for kind, section in linear.terms.items():
            container.add_term(load_term(kind).unset(section, split, linear.out_features, dtype))
    container.input_quantization = quantization
    container.quantize_input = quantization is not None
    container.requires_grad_(False)
    place.replace(container)


def check_tensors(expected: dict[str, TensorSpec], files: list[str], optional: Collection[str] = ()) -> None:
    """Compares the tensors in safetensors files with those that a model needs, by name, shape and kind of number.

    Args:
        expected: tensors that the model needs, by name.
        files: paths of the safetensors files.
        optional: names of tensors that may be there and are not read, such as a tied head.

    Raises:
        ValueError: naming missing, surplus and mis-shaped tensors, or a file that cannot be read.
    """
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        try:
            header = read_header(Path(file))
            found |= {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} cannot be read as safetensors ({error}); download it again") from error
    problems = [f"{name} is missing" for name in expected if name not in found]
    checked = (tensor_problem(name, *found[name], expected.get(name)) for name in found if name not in optional)
    problems += [problem for problem in checked if problem is not None]
    refuse(sorted(problems))


def register_loader(push_to_hub: Callable[..., Any] | None = None) -> None:
    """Registers the quantizer and the model classes with transformers; calling it again changes nothing.

    Args:
        push_to_hub: function behind the models' `push_to_hub`; None keeps the one that was given before.
    """
    if push_to_hub is not None:
        publish_by(push_to_hub)
    register_models(sorted(architectures()))
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(QuadQuantizationConfig)
        register_quantizer(QUANT_METHOD)(QuadHfQuantizer)
        # Without this, `from_pretrained` would warn and go on with the config of the checkpoint alone.
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (QuadQuantizationConfig,)


def _return_freed_memory() -> None:
    """Gives what repacking has freed back to the system: glibc keeps it, as much as the weights take."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
