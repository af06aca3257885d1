"""The tensors of a QUAD checkpoint, and a check of those that are loaded.

vLLM does not report missing tensors of a quantized model, and knows fused parameters only. This check runs on the
stream of tensors under the names of the checkpoint.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from quad_modifiers.checkpoint.format import LinearFormat, QuadFormat
from quad_modifiers.checkpoint.models import quad_model_type
from quad_modifiers.checkpoint.tables import install_tables
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder, PlacedLinear
from quad_modifiers.nn.packed_table import PackedTable

_LISTED = 5  # tensors named in one error message


class TensorSpec(NamedTuple):
    """What a tensor must look like.

    Attributes:
        shape: exactly.
        dtype: exactly for integers; one floating-point type is as good as another.
        value: exactly, where the config determines it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    value: tuple[int, ...] | None = None


def linear_tensors(linear: LinearFormat, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Tensors of one linear by their names below `<linear>.`, in a model of `dtype`."""
    split, out = linear.split(), linear.out_features
    width = split.residual_width
    specs: dict[str, TensorSpec] = {}
    if linear.weight is None:
        specs["residual.weight"] = TensorSpec((out, width), dtype)
    else:
        per_word = 32 // linear.weight.bits
        groups = 1 if linear.weight.group_size is None else width // linear.weight.group_size
        specs["residual.weight_packed"] = TensorSpec((out, -(-width // per_word)), torch.int32)
        specs["residual.weight_scale"] = TensorSpec((out, groups), dtype)
        specs["residual.weight_shape"] = TensorSpec((2,), torch.int64, (out, width))
        if not linear.weight.symmetric:
            specs["residual.weight_zero_point"] = TensorSpec((-(-out // per_word), groups), torch.int32)
    if split.rank:
        specs["outlier.weight"] = TensorSpec((out, split.rank), dtype)
    if linear.bias:
        specs["bias"] = TensorSpec((out,), dtype)
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
        dtype = model.dtype
        decoder = Decoder(model, architecture)
        install_tables(decoder, quad)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    specs = {
        name: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    for path, table in ((architecture.embedding, decoder.embedding), (architecture.head, decoder.head)):
        if isinstance(table, PackedTable):
            specs[f"{path}.weight_shape"] = TensorSpec((2,), torch.int64, (table.rows, table.columns))
    for place in decoder.linears():
        name, linear = place.name, _described(quad, place)
        specs.pop(f"{name}.weight")
        specs.pop(f"{name}.bias", None)
        specs |= {f"{name}.{suffix}": spec for suffix, spec in linear_tensors(linear, dtype).items()}
    return specs


def _described(quad: QuadFormat, place: PlacedLinear) -> LinearFormat:
    role, name, stock = place.role, place.name, place.module
    linear = quad.linears.get(role)
    if linear is None:
        raise ValueError(f"the checkpoint does not describe {role}; its quantization_config is damaged")
    if (linear.in_features, linear.out_features) != (stock.in_features, stock.out_features):
        raise ValueError(
            f"{name} has {linear.in_features} inputs and {linear.out_features} outputs by its quantization_config, "
            f"{stock.in_features} and {stock.out_features} by the rest of config.json; the checkpoint is damaged"
        )
    return linear


def checked_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], expected: dict[str, TensorSpec], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Passes on the tensors that fit, floating-point ones cast to `dtype`; those whose value was known are dropped.

    Args:
        tensors: names and tensors of the checkpoint.
        expected: from `expected_tensors`.
        dtype: of the model that is being loaded.

    Raises:
        ValueError: when the stream cannot be read, or at its end, naming tensors that are missing, surplus or damaged.
    """
    missing, problems = set(expected), []
    for name, tensor in _readable(tensors):
        problem = _problem(name, tensor, expected.get(name))
        missing.discard(name)
        if problem is not None:
            problems.append(problem)
        elif expected[name].value is None:
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
    problems += [f"{name} is missing" for name in sorted(missing)]
    if problems:
        more = f" and {len(problems) - _LISTED} more problems" if len(problems) > _LISTED else ""
        raise ValueError(f"the checkpoint does not fit its config: {'; '.join(problems[:_LISTED])}{more}")


def _readable(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    iterator = iter(tensors)
    last = "none"
    while True:
        try:
            name, tensor = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(
                f"the checkpoint's files cannot be read as safetensors ({error}; last tensor read: {last}); download "
                "it again"
            ) from error
        last = name
        yield name, tensor


def _problem(name: str, tensor: torch.Tensor, spec: TensorSpec | None) -> str | None:
    if spec is None:
        return f"{name} is not part of the model"
    if tuple(tensor.shape) != spec.shape:
        return f"{name} has shape {list(tensor.shape)}, needed is {list(spec.shape)}"
    fits = tensor.is_floating_point() if spec.dtype.is_floating_point else tensor.dtype == spec.dtype
    if not fits:
        return f"{name} has dtype {tensor.dtype}, needed is {spec.dtype}"
    if spec.value is not None and tuple(tensor.tolist()) != spec.value:
        return f"{name} says {tensor.tolist()}, config.json says {list(spec.value)}"
    if name.endswith(".weight_scale") and not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
        return f"{name} holds NaN, infinite or negative values"
    return None
