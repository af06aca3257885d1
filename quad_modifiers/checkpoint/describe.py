"""Describes a compressed model in the terms of its checkpoint: one entry per role, and compressed-tensors' groups."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from quad_modifiers.checkpoint.contribute import Contributions
from quad_modifiers.checkpoint.format import (
    QUANT_METHOD,
    BasisFormat,
    InputFormat,
    LinearFormat,
    OutlierBlockFormat,
    OverrideFormat,
    QuadFormat,
    TableFormat,
    WeightFormat,
)
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.from_compressed_tensors import check_storable, scheme_of, unstorable_inputs
from quad_modifiers.nn.packed_table import is_packed
from quad_modifiers.nn.quad_linear import QuadLinear

RoleFormats = dict[str, LinearFormat]


class Described(NamedTuple):
    """The linears of a model.

    Attributes:
        plain: whether plain compressed-tensors can express the model.
        linears: the format that the linears of a role have in most blocks.
        overrides: other bits that they have in some.
    """

    plain: bool
    linears: RoleFormats
    overrides: tuple[OverrideFormat, ...] = ()


def describe_linears(decoder: Decoder, contributed: Contributions) -> Described:
    """Returns how the linears are quantized.

    Roles are described once: in every block they must be alike, but for the bits of weights and inputs.
    """
    _refuse_other_quantization(decoder)
    found: dict[str, dict[int, LinearFormat]] = {}
    for block in decoder.blocks:
        for linear in block.linears():
            where = f"layer {block.index} {linear.name.removeprefix(block.name + '.')}"
            described = _describe(linear.module, where)
            by_layer = found.setdefault(linear.role, {})
            known = by_layer.setdefault(block.index, described)
            first = next(iter(by_layer.values()))
            if known != described or _without_bits(first) != _without_bits(described):
                raise ValueError(
                    f"{where} is quantized differently from layer 0: {described} against {first}; the "
                    "checkpoint format needs the same settings in every layer"
                )
    linears, overrides = {}, []
    for role, by_layer in found.items():
        linears[role] = _commonest(by_layer)
        overrides += _overrides(role, by_layer, linears[role])
    packed_ends = is_packed(decoder.embedding) or is_packed(decoder.head)
    plain = not packed_ends and not contributed.sections and not overrides and all(map(_is_plain, linears.values()))
    return Described(plain, linears, tuple(overrides))


def _without_bits(linear: LinearFormat) -> dict[str, Any]:
    """What of a format must be the same in every block."""
    quantized = {name: getattr(linear, name) is not None for name in ("weight", "input")}
    return {**linear.model_dump(exclude={"weight", "input"}), **quantized}


def _commonest(by_layer: dict[int, LinearFormat]) -> LinearFormat:
    """The format of most blocks, of several that of the first."""
    counts = Counter((linear.weight, linear.input) for linear in by_layer.values())
    most = max(counts.values())
    return next(linear for linear in by_layer.values() if counts[linear.weight, linear.input] == most)


def _overrides(role: str, by_layer: dict[int, LinearFormat], common: LinearFormat) -> list[OverrideFormat]:
    others: dict[Any, list[int]] = {}
    for layer, linear in by_layer.items():
        if linear != common:
            others.setdefault((linear.weight, linear.input), []).append(layer)
    return [
        OverrideFormat(role=role, layers=tuple(layers), weight=weight, input=inputs)
        for (weight, inputs), layers in others.items()
    ]


def _refuse_other_quantization(decoder: Decoder) -> None:
    """Only residual linears, and the packed tables of EmbeddingHeadQuant, have a place for scales in the format."""
    architecture = decoder.architecture
    residuals = {linear.module.residual for linear in decoder.linears()}
    for name, module in decoder.model.named_modules():
        if module not in residuals and scheme_of(module) is not None:
            raise ValueError(
                f"{name} is quantized, but a QUAD checkpoint holds quantized weights in the linears of the decoder "
                f"blocks only; add {name!r} to the quantizer's ignore list"
                + (" and use EmbeddingHeadQuant" if name in (architecture.embedding, architecture.head) else "")
            )


def _is_plain(linear: LinearFormat) -> bool:
    # compressed-tensors has no clip ratio, and its packed format no quantized input without a quantized weight.
    input_is_stock = linear.input is None or (linear.input.clip_ratio == 1.0 and linear.weight is not None)
    # Its NVFP4 inputs have a scale per tensor that was calibrated; ours none.
    calibrated = linear.input is not None and linear.input.number_format == "nvfp4"
    if not input_is_stock or calibrated or any(grid.sub_scale_bits for grid in linear.grids()):
        return False
    return linear.outliers_per_block == 0 and not linear.hadamard and not linear.terms


def _describe(module: QuadLinear, where: str) -> LinearFormat:
    split, terms = module.split, {term.kind: term.section() for term in module.terms()}
    return LinearFormat(
        outliers_per_block=split.outliers,
        block=split.block,
        keep_width=split.keep_width,
        hadamard=split.hadamard,
        in_features=split.width,
        out_features=module.out_features,
        bias=module.bias is not None,
        weight=_weight_format(module, where),
        input=_input_format(module, where),
        **_outlier_format(module),
        **({"terms": terms} if terms else {}),
    )


def _outlier_format(module: QuadLinear) -> dict[str, Any]:
    """The field, left out in full precision: only version 5 has it."""
    if module.packed_outlier is None:
        return {}
    quantized = module.outlier_quantization if module.quantize_input else None
    return {"outlier": OutlierBlockFormat(input_bits=None if quantized is None else quantized.bits)}


def _input_format(module: QuadLinear, where: str) -> InputFormat | None:
    scheme = scheme_of(module.residual)
    stock = None if scheme is None else scheme.input_activations
    if stock is not None:  # a stock modifier quantizes the residual's input
        problem = unstorable_inputs(stock)
        if problem is not None:
            raise ValueError(f"{where}: {problem}")
        return InputFormat(
            bits=stock.num_bits, clip_ratio=1.0, group_size=stock.group_size, **_symmetric(stock.symmetric)
        )
    ours = module.input_quantization if module.quantize_input else None
    if ours is None:
        return None
    return InputFormat(
        bits=ours.bits,
        clip_ratio=ours.clip_ratio,
        group_size=ours.group_size,
        **_sub_scale_bits(ours.sub_scale_bits),
        **_symmetric(ours.symmetric),
        **_number_format(ours.number_format),
        **({"four_over_six": True} if ours.four_over_six else {}),
    )


def _weight_format(module: QuadLinear, where: str) -> WeightFormat | None:
    check_storable(module.residual, where)
    packed = module.packed()
    if packed is None:
        return None
    grid = packed.grid
    return WeightFormat(
        bits=grid.bits,
        group_size=grid.group_size,
        symmetric=grid.symmetric,
        **_sub_scale_bits(grid.sub_scale_bits),
        **_number_format(grid.number_format),
    )


def _number_format(number_format: str) -> dict[str, Any]:
    """The field, left out where it says nothing: only version 8 has it."""
    return {} if number_format == "int" else {"number_format": number_format}


def _sub_scale_bits(bits: int | None) -> dict[str, Any]:
    """The field, left out where it says nothing: only version 4 has it."""
    return {} if bits is None else {"sub_scale_bits": bits}


def _symmetric(symmetric: bool) -> dict[str, Any]:
    """The field of an input, left out where it says nothing: only version 7 has it."""
    return {} if symmetric else {"symmetric": False}


def quantization_config(decoder: Decoder, described: Described, contributed: Contributions) -> dict[str, Any] | None:
    """Returns `quantization_config` of config.json, or None for a plain model with nothing quantized."""
    architecture, plain = decoder.architecture, described.plain
    ends = ((architecture.embedding, decoder.embedding), (architecture.head, decoder.head))
    tables = [path for path, module in ends if is_packed(module)]
    groups = config_groups(described, tables, architecture.layers)
    if plain and not groups:
        return None
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors" if plain else QUANT_METHOD,
        "format": _common_format(groups),
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [path for path in (architecture.head,) if path not in tables],
        "kv_cache_scheme": None,
    }
    if not plain:
        config["quad"] = QuadFormat.lowest(
            base_model_type=architecture.model_type,
            residual_basis=None if contributed.basis is None else BasisFormat(**contributed.basis),
            linears=described.linears,
            overrides=described.overrides,
            embedding=TableFormat() if architecture.embedding in tables else None,
            head=TableFormat() if architecture.head in tables else None,
            sections=contributed.sections,
        ).section()
    return config


def _common_format(groups: dict[str, Any]) -> str:
    """compressed-tensors' name for all groups."""
    formats = {group["format"] for group in groups.values()}
    return "mixed-precision" if len(formats) > 1 else next(iter(formats), _format_name("int"))


def _format_name(number_format: str) -> str:
    return "pack-quantized" if number_format == "int" else f"{number_format}-pack-quantized"


def config_groups(described: Described, tables: list[str], layers: str) -> dict[str, Any]:
    """Returns compressed-tensors' `config_groups`: linears with the same quantization share a group.

    Unless plain, packed weights are children `residual` of the linears. `tables` are paths of a packed embedding or
    head, `layers` is that of the blocks.
    """
    settings: dict[str, tuple[list[str], dict[str, Any]]] = {}
    suffix = "" if described.plain else r"\.residual"

    def add(target: str, scheme: dict[str, Any]) -> None:
        settings.setdefault(repr(scheme), ([], scheme))[0].append(target)

    for role, linear in described.linears.items():
        if linear.weight is None:
            continue
        named = [each for each in described.overrides if each.role == role]
        elsewhere = sorted(layer for each in named for layer in each.layers)
        add(f"{_target(role, layers, elsewhere, besides=True)}{suffix}$", _scheme(linear))
        for each in named:
            add(f"{_target(role, layers, each.layers)}{suffix}$", _scheme(each.replaced(linear)))
        if linear.outlier is not None:
            add(rf"{_target(role)}\.outlier$", _outlier_scheme(linear.outlier))
    if tables:  # a tied head has no tensors of its own
        scheme = {
            "weights": _arguments(TableFormat().bits, None, True, dynamic=False),
            "input_activations": None,
            "output_activations": None,
            "format": _format_name("int"),
        }
        settings.setdefault(repr(scheme), ([], scheme))[0].extend(tables)
    return {
        f"group_{index}": {"targets": targets, **scheme} for index, (targets, scheme) in enumerate(settings.values())
    }


def _target(role: str, path: str = "", layers: Sequence[int] = (), besides: bool = False) -> str:
    """The beginning of a pattern for the linears of a role: of all blocks, of some, or of all `besides` some."""
    if not layers:
        return rf"re:.*\.{role}"
    block = rf"(?{'!' if besides else ':'}(?:{'|'.join(map(str, layers))})\.)"
    return rf"re:{re.escape(path)}\.{block}(?:.*\.)?{role}"


def _scheme(linear: LinearFormat) -> dict[str, Any]:
    assert linear.weight is not None
    return {
        "weights": _grid_arguments(linear.weight, dynamic=False),
        "input_activations": None if linear.input is None else _grid_arguments(linear.input, dynamic=True),
        "output_activations": None,
        "format": _format_name(linear.weight.number_format),
    }


def _grid_arguments(grid: WeightFormat | InputFormat, dynamic: bool) -> dict[str, Any]:
    if grid.number_format == "int":
        return _arguments(grid.bits, grid.group_size, grid.symmetric, dynamic)
    is_nvfp4 = grid.number_format == "nvfp4"
    return {
        **_arguments(grid.bits, grid.group_size, grid.symmetric, dynamic),
        "type": "float",
        "strategy": "tensor_group" if is_nvfp4 and not dynamic else "group",
        "scale_dtype": "torch.float8_e4m3fn" if is_nvfp4 else "torch.uint8",
    }


def _outlier_scheme(outlier: OutlierBlockFormat) -> dict[str, Any]:
    bits = outlier.input_bits
    return {
        "weights": _arguments(outlier.weight_bits, None, True, dynamic=False),
        "input_activations": None if bits is None else _arguments(bits, None, True, dynamic=True),
        "output_activations": None,
        "format": _format_name("int"),
    }


def _arguments(bits: int, group_size: int | None, symmetric: bool, dynamic: bool) -> dict[str, Any]:
    per_row = "token" if dynamic else "channel"
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": per_row if group_size is None else "group",
        "group_size": group_size,
        "dynamic": dynamic,
        "observer": None,
    }
