"""The table of a checkpoint's tensors, as its config describes them, and the check of one tensor against it.

transformers' loader checks the headers of the files, vLLM's plugin the tensors as they arrive; neither library would
report a tensor that is missing.
"""

from typing import Any

import torch
from quad_kernels import IntegerGrid
from torch import nn
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.format import LinearFormat, QuadFormat
from quad_modifiers.checkpoint.installed_sections import install_sections
from quad_modifiers.checkpoint.models import quad_model_type
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder, PlacedLinear
from quad_modifiers.nn.packed_shapes import TensorSpec, packed_shapes
from quad_modifiers.nn.packed_table import BITS
from quad_modifiers.nn.quad_linear import OUTLIER_GRID
from quad_modifiers.plugins.checkpoint_parts import load_term

_LISTED = 5  # problems named in one error message


def linear_tensors(linear: LinearFormat, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Returns the tensors of one linear by their names below `<linear>.`, in a model of `dtype`."""
    split, out, weight = linear.split(), linear.out_features, linear.weight
    specs: dict[str, TensorSpec] = {}
    if weight is None:
        specs["residual.weight"] = TensorSpec((out, split.residual_width), dtype)
    else:
        packed = packed_shapes(out, split.residual_width, weight.grid(), dtype)
        specs |= {f"residual.{name}": spec for name, spec in packed.items()}
    if linear.outlier is not None:
        packed = packed_shapes(out, split.rank, OUTLIER_GRID, dtype)
        specs |= {f"outlier.{name}": spec for name, spec in packed.items()}
    elif split.rank:
        specs["outlier.weight"] = TensorSpec((out, split.rank), dtype)
    if linear.bias:
        specs["bias"] = TensorSpec((out,), dtype)
    for kind, section in linear.terms.items():
        with torch.device("meta"):
            term = load_term(kind).unset(section, split, out, dtype)
        for name, tensor in term.state_dict().items():
            specs[f"{kind}.{name}"] = TensorSpec(tuple(tensor.shape), tensor.dtype)
    return specs


def expected_tensors(config: Any, quad: QuadFormat, known: dict[str, Architecture]) -> dict[str, TensorSpec]:
    """Returns all tensors of a checkpoint by name.

    Args:
        config: transformers config of the checkpoint.
        quad: its `quad` section.
        known: architectures by stock model type.

    Raises:
        ValueError: if config.json and its `quad` section contradict each other.
    """
    architecture = known.get(quad.base_model_type)
    if architecture is None or config.model_type != quad_model_type(quad.base_model_type):
        raise ValueError(
            f"the checkpoint's base model type is {quad.base_model_type!r}, its model_type {config.model_type!r}; "
            f"they must belong together, and the base must be one of {', '.join(sorted(known))}"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    decoder = Decoder(model, architecture)
    install_sections(decoder, quad)
    return model_tensors(decoder, quad)


def model_tensors(decoder: Decoder, quad: QuadFormat) -> dict[str, TensorSpec]:
    """Returns all tensors of a checkpoint by name, from a stock model in which only its sections are installed yet.

    Raises:
        ValueError: if the model and the `quad` section contradict each other.
    """
    model, architecture, tied = decoder.model, decoder.architecture, tied_names(decoder.model)
    _check_layers(decoder, quad)
    specs = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    ends = ((architecture.embedding, decoder.embedding), (architecture.head, decoder.head))
    for (path, module), packed in zip(ends, packed_tables(decoder, quad), strict=True):
        if packed:
            del specs[f"{path}.weight"]
            rows, columns = module.weight.shape
            shapes = packed_shapes(rows, columns, IntegerGrid(BITS), module.weight.dtype)
            specs |= {f"{path}.{name}": spec for name, spec in shapes.items()}
    for place in decoder.linears():
        name, dtype = place.name, place.module.weight.dtype
        linear = _checked_format(quad, place)
        del specs[f"{name}.weight"]
        specs.pop(f"{name}.bias", None)
        specs |= {f"{name}.{below}": spec for below, spec in linear_tensors(linear, dtype).items()}
    return specs


def _check_layers(decoder: Decoder, quad: QuadFormat) -> None:
    for each in quad.overrides:
        if each.layers[-1] >= len(decoder.blocks):
            raise ValueError(
                f"overrides of {each.role} name layer {each.layers[-1]}, and the model has {len(decoder.blocks)} "
                "layers; the checkpoint is damaged"
            )


def packed_tables(decoder: Decoder, quad: QuadFormat) -> tuple[bool, bool]:
    """Returns whether the embedding and the head are packed and have tensors of their own; a tied head has none.

    Raises:
        ValueError: if head and embedding share one tensor and only one of them is quantized.
    """
    tied = bool(decoder.model.config.tie_word_embeddings)
    if tied and (quad.embedding is None) != (quad.head is None):
        raise ValueError(
            "the checkpoint says that head and embedding share one tensor, but only one of them is quantized; its "
            "config.json is damaged"
        )
    return quad.embedding is not None, quad.head is not None and not tied


def tied_names(model: nn.Module) -> set[str]:
    """Returns the names of tensors that a tied model shares and its checkpoint leaves out."""
    return set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()


def format_of(quad: QuadFormat, place: PlacedLinear) -> LinearFormat:
    """Returns the format of a linear.

    Raises:
        ValueError: if the checkpoint does not describe its role.
    """
    linear: LinearFormat | None = quad.of_layer(place.layer).get(place.role)
    if linear is None:
        raise ValueError(f"the checkpoint does not describe {place.role}; its quantization_config is damaged")
    return linear


def _checked_format(quad: QuadFormat, place: PlacedLinear) -> LinearFormat:
    linear, name, stock = format_of(quad, place), place.name, place.module
    if (linear.in_features, linear.out_features) != (stock.in_features, stock.out_features):
        raise ValueError(
            f"{name} has {linear.in_features} inputs and {linear.out_features} outputs by its quantization_config, "
            f"{stock.in_features} and {stock.out_features} by the rest of config.json; the checkpoint is damaged"
        )
    return linear


def tensor_problem(name: str, shape: tuple[int, ...], dtype: torch.dtype | str, spec: TensorSpec | None) -> str | None:
    """Returns what is wrong with a tensor by its header, None if it fits.

    Args:
        name: name in the checkpoint.
        shape: shape that was found.
        dtype: dtype that was found; a string is safetensors' notation, such as "BF16".
        spec: what it must look like, None if the model has no such tensor.
    """
    if spec is None:
        return f"{name} is not part of the model"
    if shape != spec.shape:
        return f"{name} has shape {list(shape)}, needed is {list(spec.shape)}"
    if not _fits(dtype, spec.dtype):
        return f"{name} has dtype {dtype}, needed is {spec.dtype}"
    return None


def _fits(found: torch.dtype | str, needed: torch.dtype) -> bool:
    """Floating point is cast to the model's dtype; other numbers are stored as they are, their kind must be right."""
    if isinstance(found, str):
        if needed.is_floating_point:
            return found.startswith(("F", "BF"))
        kind = "BOOL" if needed == torch.bool else f"{'I' if needed.is_signed else 'U'}{8 * needed.itemsize}"
        return found == kind
    return found.is_floating_point if needed.is_floating_point else found == needed


def value_problem(name: str, tensor: torch.Tensor, spec: TensorSpec) -> str | None:
    """Returns what is wrong with the content of a tensor that fits its spec, None if nothing is."""
    owner, _, leaf = name.rpartition(".")
    if leaf == "weight_shape" and spec.value is not None and tuple(tensor.tolist()) != spec.value:
        return f"{owner}.weight_shape says {tensor.tolist()}, config.json says {list(spec.value)}"
    if leaf == "weight_global_scale" and not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        return f"{owner}.weight_global_scale is no positive number"
    if leaf == "weight_scale":
        # Exponents of e8m0 are integers, of which the last stands for no number.
        usable = tensor != 255 if spec.dtype == torch.uint8 else torch.isfinite(tensor.float()) & (tensor.float() >= 0)
        if not bool(usable.all()):
            return f"{owner}.weight_scale holds NaN, infinite or negative values"
    return None


def refuse(problems: list[str]) -> None:
    """Refuses a checkpoint if there are problems.

    Raises:
        ValueError: with the first of them and the number of the others.
    """
    if problems:
        more = f" and {len(problems) - _LISTED} more problems" if len(problems) > _LISTED else ""
        raise ValueError(f"the checkpoint does not fit its config: {'; '.join(problems[:_LISTED])}{more}")
