"""Describes a compressed model in the terms of its checkpoint: one entry per role, and compressed-tensors' groups."""

from typing import Any

from quad_modifiers.checkpoint.contribute import Contributions
from quad_modifiers.checkpoint.format import (
    QUANT_METHOD,
    BasisFormat,
    InputFormat,
    LinearFormat,
    OutlierBlockFormat,
    QuadFormat,
    TableFormat,
    WeightFormat,
)
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.nn.from_compressed_tensors import check_storable, scheme_of, unstorable_inputs
from quad_modifiers.nn.packed_table import is_packed
from quad_modifiers.nn.quad_linear import QuadLinear

RoleFormats = dict[str, LinearFormat]


def describe_linears(decoder: Decoder, contributed: Contributions) -> tuple[bool, RoleFormats]:
    """Returns whether plain compressed-tensors can express the model, and the format of each role.

    Roles are described once: in every block they must be alike.
    """
    _refuse_other_quantization(decoder)
    formats: RoleFormats = {}
    for block in decoder.blocks:
        for linear in block.linears():
            where = f"layer {block.index} {linear.name.removeprefix(block.name + '.')}"
            described = _describe(linear.module, where)
            known = formats.setdefault(linear.role, described)
            if known != described:
                raise ValueError(
                    f"{where} is quantized differently from layer 0: {described} against {known}; the "
                    "checkpoint format needs the same settings in every layer"
                )
    packed_ends = is_packed(decoder.embedding) or is_packed(decoder.head)
    return not packed_ends and not contributed.sections and all(_is_plain(f) for f in formats.values()), formats


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
    if not input_is_stock or any(grid.sub_scale_bits for grid in linear.grids()):
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
        return InputFormat(bits=stock.num_bits, clip_ratio=1.0, group_size=stock.group_size)
    ours = module.input_quantization if module.quantize_input else None
    if ours is None:
        return None
    return InputFormat(
        bits=ours.bits,
        clip_ratio=ours.clip_ratio,
        group_size=ours.group_size,
        **_sub_scale_bits(ours.sub_scale_bits),
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
    )


def _sub_scale_bits(bits: int | None) -> dict[str, Any]:
    """The field, left out where it says nothing: only version 4 has it."""
    return {} if bits is None else {"sub_scale_bits": bits}


def quantization_config(
    decoder: Decoder, plain: bool, linears: RoleFormats, contributed: Contributions
) -> dict[str, Any] | None:
    """Returns `quantization_config` of config.json, or None for a plain model with nothing quantized."""
    architecture = decoder.architecture
    ends = ((architecture.embedding, decoder.embedding), (architecture.head, decoder.head))
    tables = [path for path, module in ends if is_packed(module)]
    groups = config_groups(plain, linears, tables)
    if plain and not groups:
        return None
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors" if plain else QUANT_METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [path for path in (architecture.head,) if path not in tables],
        "kv_cache_scheme": None,
    }
    if not plain:
        config["quad"] = QuadFormat.lowest(
            base_model_type=architecture.model_type,
            residual_basis=None if contributed.basis is None else BasisFormat(**contributed.basis),
            linears=linears,
            embedding=TableFormat() if architecture.embedding in tables else None,
            head=TableFormat() if architecture.head in tables else None,
            sections=contributed.sections,
        ).section()
    return config


def config_groups(plain: bool, linears: RoleFormats, tables: list[str]) -> dict[str, Any]:
    """Returns compressed-tensors' `config_groups`: roles with the same quantization share a group.

    Unless `plain`, packed weights are children `residual` of the linears. `tables` are paths of a packed embedding or
    head.
    """
    settings: dict[str, tuple[list[str], dict[str, Any]]] = {}
    suffix = "" if plain else r"\.residual"
    for role, linear in linears.items():
        if linear.weight is None:
            continue
        scheme = {
            "weights": _arguments(linear.weight.bits, linear.weight.group_size, linear.weight.symmetric, dynamic=False),
            "input_activations": None
            if linear.input is None
            else _arguments(linear.input.bits, linear.input.group_size, True, dynamic=True),
            "output_activations": None,
            "format": "pack-quantized",
        }
        settings.setdefault(repr(scheme), ([], scheme))[0].append(rf"re:.*\.{role}{suffix}$")
        if linear.outlier is not None:
            scheme = _outlier_scheme(linear.outlier)
            settings.setdefault(repr(scheme), ([], scheme))[0].append(rf"re:.*\.{role}\.outlier$")
    if tables:  # a tied head has no tensors of its own
        scheme = {
            "weights": _arguments(TableFormat().bits, None, True, dynamic=False),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        settings.setdefault(repr(scheme), ([], scheme))[0].extend(tables)
    return {
        f"group_{index}": {"targets": targets, **scheme} for index, (targets, scheme) in enumerate(settings.values())
    }


def _outlier_scheme(outlier: OutlierBlockFormat) -> dict[str, Any]:
    bits = outlier.input_bits
    return {
        "weights": _arguments(outlier.weight_bits, None, True, dynamic=False),
        "input_activations": None if bits is None else _arguments(bits, None, True, dynamic=True),
        "output_activations": None,
        "format": "pack-quantized",
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
