"""Bits of a checkpoint's weights and inputs, by linear and as a tag such as "w4a4a8"."""

from collections.abc import Sequence

from quad_modifiers.checkpoint.format import LinearFormat, QuadFormat, read_format
from quad_modifiers.model.architecture import Architecture, Group
from quad_modifiers.plugins import architectures
from quad_modifiers.records.inventory import Inventory

_BLOCK = Architecture("").roles()  # for models whose architecture no installed plugin knows


def width_tags(inventory: Inventory) -> list[str]:
    """Returns a tag such as "w4a4" or "w4a4a8" (inputs of U-type, then of D-type linears), if the widths allow one."""
    if inventory.quad is None:
        pairs = group_bits(inventory)
        return [f"w{pairs[0][0]}a{pairs[0][1]}"] if len(set(pairs)) == 1 else []
    quad = read_format(inventory.quad)
    groups = groups_of_roles(quad)
    if not quad.linears.keys() <= groups.keys():  # of an architecture that no installed plugin knows
        return []
    weights = {weight_bits(linear) for _, linear in quad.variants()}
    inputs = [
        {input_bits(linear) for role, linear in quad.variants() if groups[role].writes_stream == d_type}
        for d_type in (False, True)
    ]
    if len(weights) != 1 or any(len(bits) != 1 for bits in inputs):
        return []
    u_type, d_type = (bits.pop() for bits in inputs)
    return [f"w{weights.pop()}a{u_type}" + ("" if u_type == d_type else f"a{d_type}")]


def groups_of_roles(quad: QuadFormat) -> dict[str, Group]:
    """Returns the group of each role of a checkpoint, in the order in which a block runs them."""
    known = architectures().get(quad.base_model_type)
    return _BLOCK if known is None else known.roles()


def layer_ranges(layers: Sequence[int]) -> str:
    """Returns numbers of layers in rising order as ranges, "layer 3" or "layers 0-3, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    named = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"layer {named}" if len(layers) == 1 else f"layers {named}"


def weight_bits(linear: LinearFormat) -> int:
    """Returns the bits of a linear's quantized weight, 16 if it is not quantized."""
    return 16 if linear.weight is None else linear.weight.bits


def input_bits(linear: LinearFormat) -> int:
    """Returns the bits of a linear's quantized input, 16 if it is not quantized."""
    return 16 if linear.input is None else linear.input.bits


def group_bits(inventory: Inventory) -> list[tuple[int, int]]:
    """Returns (weight bits, input bits) of each compressed-tensors config group; 16 where it quantizes nothing."""
    groups = inventory.config["quantization_config"].get("config_groups") or {}
    return [
        tuple((group.get(part) or {}).get("num_bits", 16) for part in ("weights", "input_activations"))
        for group in groups.values()
    ]
