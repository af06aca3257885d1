"""Writes a QUAD checkpoint as a plain compressed-tensors one, for runtimes without this package.

compressed-tensors knows no split: one linear has one integer weight and one integer input. What it does know are scales
per group of input coordinates. If every outlier block is a whole number of groups, the residual keeps its integers and
its step widths, and only the outlier block loses precision: to the bits of the residual, in groups of its own.
docs/guide/export.md says what that costs.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quad_kernels import IntegerGrid, QuantizedWeight
from torch import nn

from quad_modifiers.checkpoint.dequantize import dense_weight
from quad_modifiers.checkpoint.describe import Described, config_groups
from quad_modifiers.checkpoint.exported_folder import DAMAGED, check_finite, write_export
from quad_modifiers.checkpoint.format import LinearFormat, QuadFormat
from quad_modifiers.checkpoint.installed_sections import fold_sections, lasting_sections
from quad_modifiers.checkpoint.models import TRIPWIRE_FIELD
from quad_modifiers.checkpoint.opened import Opened, open_checkpoint
from quad_modifiers.checkpoint.transforms import FIELD as TRANSFORM_FIELD
from quad_modifiers.checkpoint.transforms import (
    RUNTIME_NOTE,
    transform_config,
    transform_problems,
    transform_tensors,
)
from quad_modifiers.model.architecture import Architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.packed_linear import PackedLinear
from quad_modifiers.nn.packed_table import PackedHead, PackedTable
from quad_modifiers.nn.quad_linear import QuadLinear
from quad_modifiers.output_folder import check_target, user_path
from quad_modifiers.quantization.grid import round_to_grid, search_clip
from quad_modifiers.records.export_record import Export
from quad_modifiers.records.inventory import read_json
from quad_modifiers.version import __version__

PORTABLE_RECIPE = "quad_w4a4_portable"
_GROUP_SIZES = (128, 64, 32, 16, 8)  # tried in this order; stock kernels take the first three


def export_compressed_tensors(
    source_folder: str | Path, target_folder: str | Path, group_size: int | None = None, online_hadamard: bool = False
) -> Path:
    """Writes `source_folder` as a compressed-tensors checkpoint that stock transformers and vLLM load.

    Residual weights keep their integers and scales; outlier columns are rounded to the same bits, with scales of their
    own. Inputs that the source quantizes get one scale per group.

    Args:
        source_folder: a QUAD checkpoint in the square basis, without clip ratios.
        target_folder: must not exist or be empty.
        group_size: input coordinates per scale; by default the source's, or the largest that fits.
        online_hadamard: True to write online Hadamards, which are refused otherwise, as `transform_config`: for vLLM
            on one CUDA device and nothing else.

    Returns:
        The target folder.

    Raises:
        ValueError: with everything that compressed-tensors cannot express and the recipe that avoids it, or naming a
            damaged tensor of the source.
        FileNotFoundError: if there is no checkpoint in the source folder.
        FileExistsError, OSError: if the target is not empty or the disk is full; nothing is left behind.
    """
    source, target = user_path(source_folder), user_path(target_folder)
    check_target(target)
    opened, quad = _open(source)
    size = _group_size(quad, group_size)
    problems = _problems(quad, size, online_hadamard)
    if problems:
        raise ValueError(
            f"{source} cannot be written as compressed-tensors: {'; '.join(problems)}. Compress the original model "
            f"with the recipe {PORTABLE_RECIPE!r} instead"
        )
    if online_hadamard and not any(linear.hadamard for linear in quad.linears.values()):
        raise ValueError(f"{source} has no online Hadamards to write; leave online_hadamard (--online-hadamard) out")
    model = opened.load()
    check_finite(model, DAMAGED)
    fold_sections(Decoder(model, opened.architecture), quad, model.dtype)
    tensors = _tensors(model, opened.architecture, quad, size)
    content = _config(read_json(source / "config.json"), opened.architecture, _plain_formats(quad, size), model)
    if online_hadamard:
        names = {module.role: name for name, module in reversed(list(_containers(model).items()))}
        tensors |= transform_tensors(quad.linears, names, model.dtype)
        content["quantization_config"][TRANSFORM_FIELD] = transform_config(quad.linears)
    record = Export(
        format="compressed-tensors",
        source=opened.inventory().format,
        notes=_notes(quad, size, online_hadamard),
        package=__version__,
    )
    write_export(target, source, tensors, content, record)
    return target


def _notes(quad: QuadFormat, size: int, online_hadamard: bool) -> tuple[str, ...]:
    """Sentences on what the export loses and needs."""
    notes = [f"one scale for every {size} input coordinates"]
    outliers = [role for role, linear in quad.linears.items() if linear.outliers_per_block and linear.weight]
    if outliers:
        notes.append(f"outlier weights, and their inputs, have the bits of the rest now ({', '.join(outliers)})")
    return (*notes, RUNTIME_NOTE) if online_hadamard else tuple(notes)


def _open(source: Path) -> tuple[Opened, QuadFormat]:
    opened = open_checkpoint(source)
    if opened.quantized == "compressed-tensors":
        raise ValueError(f"{source} is a compressed-tensors checkpoint already; it needs no export")
    return opened, opened.need_quad()


def _group_size(quad: QuadFormat, wanted: int | None) -> int:
    if wanted is not None:
        if wanted < 1:
            raise ValueError(f"group_size ({wanted}) must be positive; stock kernels take 32, 64 and 128")
        return wanted
    parts = [part for _, linear in quad.variants() for part in (linear.input, linear.weight) if part is not None]
    stated = [part.group_size for part in parts if part.group_size is not None]
    if stated:
        return min(stated)
    sizes = math.gcd(*(n for linear in quad.linears.values() for n in _block_sizes(linear)))
    return next((size for size in _GROUP_SIZES if sizes % size == 0), _GROUP_SIZES[-1])


def _block_sizes(linear: LinearFormat) -> tuple[int, ...]:
    """What groups must divide: 0, which everything divides, where there is no outlier block."""
    return (linear.in_features, linear.outliers_per_block, linear.block if linear.outliers_per_block else 0)


def _problems(quad: QuadFormat, size: int, online_hadamard: bool) -> list[str]:
    """Everything that stands in the way, with the roles concerned."""
    found: dict[str, list[str]] = {}
    if quad.residual_basis is not None and quad.residual_basis.basis == "extended" and quad.residual_basis.rank:
        found["the extended basis has a hidden size of its own, only basis: square can be written"] = []
    for name in lasting_sections(quad):
        found[f"the section {name!r} has no place in the format"] = []
    for role, linear in quad.variants():
        for problem in _linear_problems(linear, size, online_hadamard):
            found.setdefault(problem, []).append(role)
    return [f"{problem} ({', '.join(dict.fromkeys(roles))})" if roles else problem for problem, roles in found.items()]


def _linear_problems(linear: LinearFormat, size: int, online_hadamard: bool) -> list[str]:
    problems = [f"the term {kind!r} has no place in the format" for kind in linear.terms]
    if linear.hadamard and online_hadamard:
        problems += transform_problems(linear)
    elif linear.hadamard:
        problems.append(
            "online Hadamards need transforms, which vLLM applies on CUDA devices only (--online-hadamard), other "
            "runtimes not at all (online_rotation: [])"
        )
    if linear.input is not None and linear.input.clip_ratio != 1.0:
        problems.append(f"the clip ratio {linear.input.clip_ratio} of the inputs has no place in the format (1.0)")
    if linear.input is not None and linear.weight is None:
        problems.append("quantized inputs need quantized weights")
    if linear.in_features % size:
        problems.append(f"groups of {size} do not divide the input width {linear.in_features}")
    if linear.outliers_per_block and (linear.outliers_per_block % size or linear.block % size):
        problems.append(
            f"{linear.outliers_per_block} outliers of every {linear.block} coordinates are no multiple of the group "
            f"size {size}"
        )
    if any(part.number_format != "int" for part in linear.grids()):
        problems.append("4-bit floating-point numbers cannot be exported yet (number_format)")
    stated = [("weights", linear.weight), ("inputs", linear.input)]
    if any(part.sub_scale_bits for part in linear.grids()):
        problems.append("integers of two levels have no place in the format (sub_scale_bits)")
    for name, part in stated:
        if part is not None and part.group_size is not None and part.group_size != size:
            problems.append(f"the {name} have groups of {part.group_size}, not of {size}")
    return problems


def _tensors(model: Any, architecture: Architecture, quad: QuadFormat, size: int) -> dict[str, torch.Tensor]:
    """All tensors under their stock names."""
    containers = {linear.name: linear for linear in Decoder(model, architecture).linears()}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{container}.") for container in containers):
            tensors[name] = tensor
    # Stock transformers cannot load a packed embedding.
    embedding = model.get_submodule(architecture.embedding)
    if isinstance(embedding, PackedTable):
        tensors = _without(tensors, architecture.embedding)
        tensors[f"{architecture.embedding}.weight"] = embedding.weight
    if model.config.tie_word_embeddings:
        tensors = _without(tensors, architecture.head)
    for name, place in containers.items():
        container, linear = place.module, quad.of_layer(place.layer)[place.role]
        dtype = model.get_submodule(architecture.final_norm).weight.dtype
        if linear.weight is None:
            tensors[f"{name}.weight"] = dense_weight(container).to(dtype)
        else:
            merged = merged_weight(container, linear, size)
            tensors.update(PackedLinear.of(merged, merged.scale.dtype).state_dict(prefix=f"{name}."))
        if container.bias is not None:
            tensors[f"{name}.bias"] = container.bias.data
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _containers(model: nn.Module) -> dict[str, QuadLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuadLinear)}


def _without(tensors: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{path}.")}


def _plain_formats(quad: QuadFormat, size: int) -> Described:
    linears = {role: _plain_format(linear, size) for role, linear in quad.linears.items()}
    others = []
    for each in quad.overrides:
        plain = _plain_format(each.replaced(quad.linears[each.role]), size)
        others.append(each.model_copy(update={"weight": plain.weight, "input": plain.input}))
    return Described(True, linears, tuple(others))


def _plain_format(linear: LinearFormat, size: int) -> LinearFormat:
    update: dict[str, Any] = {
        "outliers_per_block": 0,
        "block": linear.in_features,
        "keep_width": False,
        "hadamard": False,
        "outlier": None,
    }
    for name in ("weight", "input"):
        part = getattr(linear, name)
        if part is not None:
            update[name] = part.model_copy(update={"group_size": size})
    return linear.model_copy(update=update)


def merged_weight(container: QuadLinear, linear: LinearFormat, size: int) -> QuantizedWeight:
    """Returns one integer weight for outliers and residual, in the order of the input coordinates.

    Args:
        container: with a packed residual.
        linear: its format, whose blocks are multiples of `size`.
        size: input coordinates per scale.

    Returns:
        integers `[out, in]`, scales and zero points `[out, in / size]`.
    """
    packed = container.packed()
    assert packed is not None
    assert linear.weight is not None
    split, residual = container.split, packed.quantized_weight()
    parts = [_regrouped(residual, size)]
    groups = torch.arange(split.width // size)
    if not split.rank:
        return _joined(parts, groups, size)
    outlier = container.dense_outlier(torch.float32)
    assert outlier is not None
    grid = IntegerGrid(linear.weight.bits, size, linear.weight.symmetric)
    parts.append(_rounded(outlier, grid, residual.scale.dtype))
    # Where each group of the merged weight comes from: a group of the residual, or after those one of the outliers.
    is_outlier = groups * size % split.block < split.outliers
    origin = torch.empty_like(groups)
    origin[is_outlier] = torch.arange(int(is_outlier.sum())) + residual.in_features // size
    origin[~is_outlier] = groups[~is_outlier] if split.keep_width else torch.arange(int((~is_outlier).sum()))
    return _joined(parts, origin, size)


def _regrouped(weight: QuantizedWeight, size: int) -> QuantizedWeight:
    """The same weight with one scale per `size` inputs."""
    repeat = weight.in_features // size // weight.scale.shape[1]
    zero = weight.zero_point
    return replace(
        weight,
        scale=weight.scale.repeat_interleave(repeat, dim=1),
        zero_point=None if zero is None else zero.repeat_interleave(repeat, dim=1),
    )


def _rounded(weight: torch.Tensor, grid: IntegerGrid, dtype: torch.dtype) -> QuantizedWeight:
    """A full-precision weight rounded to a grid, with scales of its own."""
    scales = search_clip(weight, grid, dtype)
    integers = round_to_grid(weight, scales.expand(weight.shape[1]), grid).to(torch.int8)
    zero = None if grid.symmetric else scales.zero_point.to(torch.int8)
    out, columns = weight.shape
    return QuantizedWeight(integers, scales.scale.to(dtype), zero, columns, out, grid.bits)


def _joined(parts: list[QuantizedWeight], groups: torch.Tensor, size: int) -> QuantizedWeight:
    """Weights side by side, of whose groups of `size` inputs the given ones are taken in order."""
    integers = torch.cat([part.integers for part in parts], dim=1).unflatten(1, (-1, size))[:, groups].flatten(1)
    scale = torch.cat([part.scale for part in parts], dim=1)[:, groups]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    zero_point = torch.cat(zeros, dim=1)[:, groups] if zeros else None
    out, columns = integers.shape
    return QuantizedWeight(integers, scale, zero_point, columns, out, parts[0].bits)


def _config(source: dict[str, Any], architecture: Architecture, formats: Described, model: Any) -> dict[str, Any]:
    config = {key: value for key, value in source.items() if key != TRIPWIRE_FIELD}
    config["model_type"] = architecture.model_type
    config["tie_word_embeddings"] = model.config.tie_word_embeddings
    config["architectures"] = [name.removeprefix("Quad") for name in source["architectures"]]
    head_is_packed = isinstance(model.get_submodule(architecture.head), PackedHead)
    unquantized = [rf"re:.*\.{role}$" for role, linear in formats.linears.items() if linear.weight is None]
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": config_groups(formats, [architecture.head] if head_is_packed else [], architecture.layers),
        "ignore": unquantized if head_is_packed else [architecture.head, *unquantized],
        "kv_cache_scheme": None,
    }
    return config
