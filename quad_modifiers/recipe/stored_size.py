"""How large the checkpoint will be that a recipe makes of a model, told before the work."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quad_modifiers.model.architecture import find_architecture
from quad_modifiers.model.decoder import Decoder
from quad_modifiers.plugins.contributions import architectures
from quad_modifiers.projection.rank import rank_of
from quad_modifiers.recipe import coverage
from quad_modifiers.recipe.layer_bits import overrides_of
from quad_modifiers.recipe.order import BRANCH, PROJECT, QUANTIZE_WEIGHTS, PlacedModifier, unties_head

if TYPE_CHECKING:
    from llmcompressor.modifiers import Modifier


def stored_size(model: Any, modifiers: "Sequence[Modifier]") -> int:
    """Returns about how many bytes the tensors of the checkpoint will take, hardly ever more than they do.

    Weights to be quantized count with their bits and nothing for scales; the outlier columns of a projection count in
    the dtype of the model, unless a modifier gives them other bits; so do a head that it unties from the embedding and
    a low-rank branch.

    Args:
        model: transformers model, not compressed yet.
        modifiers: those of the recipe, in order.
    """
    from torch import nn

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    placed = [PlacedModifier(each) for each in modifiers]
    bits = _bits(placed, linears) | _overridden(modifiers, model)
    projections = [each for each in placed if PROJECT in each.roles and not each.is_stock]
    tied = set() if any(unties_head(each.modifier) for each in projections) else set(model.all_tied_weights_keys)
    outlier_bits = next(filter(None, (getattr(each, "outlier_bits", None) for each in modifiers)), 64)
    size = 0
    for name, tensor in model.state_dict().items():
        if name not in tied:
            stored = min(bits.get(name.removesuffix(".weight"), 64), 8 * tensor.element_size())
            size += tensor.numel() * stored // 8
    for each in projections:
        if tied:  # the matrix that lets the head read the embedding's table
            width = model.config.hidden_size
            if getattr(each.modifier, "basis", "") != "square":
                width += rank_of(getattr(each.modifier, "rank", 0), width)
            size += width * width * model.get_output_embeddings().weight.element_size()
        roles = {name.split(".")[-2] for name in coverage.outlier_names(each.modifier)}
        widened = {name: linear for name, linear in linears.items() if name.rpartition(".")[2] in roles}
        rank = rank_of(getattr(each.modifier, "rank", 0), model.config.hidden_size)
        for name, linear in widened.items():
            full = 8 * linear.weight.element_size()
            more = min(outlier_bits, full)
            if getattr(each.modifier, "basis", "") == "square":  # in the place of residual columns
                more -= min(bits.get(name, 64), full)
            size += rank * linear.out_features * more // 8
    return size + sum(_branch_size(each.modifier, linears) for each in placed if BRANCH in each.roles)


def _branch_size(modifier: "Modifier", linears: dict[str, Any]) -> int:
    """Bytes of what a modifier keeps of the weights of the blocks, by its field `rank`."""
    inside = set(linears) - set(coverage.table_names())
    chosen = [linears[name] for name in coverage.covered(modifier, "weights", tuple(inside))]
    rank = getattr(modifier, "rank", 0)
    return sum(rank * (linear.in_features + linear.out_features) * linear.weight.element_size() for linear in chosen)


def _bits(placed: Sequence[PlacedModifier], linears: dict[str, Any]) -> dict[str, int]:
    """Returns the bits of the weights that the modifiers quantize, by the name of the module."""
    found: dict[str, int] = {}
    for each in placed:
        if QUANTIZE_WEIGHTS not in each.roles:
            continue
        schemes = [scheme.weights for scheme in coverage.stock_schemes(each.modifier) if scheme.weights]
        bits = min((weights.num_bits for weights in schemes), default=getattr(each.modifier, "bits", 4))
        found |= dict.fromkeys(_reached(each, tuple(linears)), bits)
    return found


def _overridden(modifiers: "Sequence[Modifier]", model: Any) -> dict[str, int]:
    """Returns the bits of the weights of linears that an override names."""
    ours: list[Any] = [each for each in modifiers if overrides_of(each) and hasattr(type(each), "bits_of")]
    if not ours:
        return {}
    decoder = Decoder(model, find_architecture(model.config, architectures()))
    found = ((linear.name, each.bits_of(linear)) for each in ours for linear in decoder.linears())
    return {name: bits for name, bits in found if bits is not None}


def _reached(placed: PlacedModifier, names: tuple[str, ...]) -> set[str]:
    targets = getattr(placed.modifier, "targets", None) or []
    tables = {path for path in coverage.table_names() if path.rpartition(".")[2] in targets}
    if tables:  # embedding and head are named by their last parts
        return tables
    # In a container the linear is called residual; targets may name the one or the other.
    in_blocks = [name for name in names if name not in coverage.table_names()]
    inside = coverage.covered(placed.modifier, "weights", tuple(f"{name}.residual" for name in in_blocks))
    return coverage.covered(placed.modifier, "weights", names) | {name.removesuffix(".residual") for name in inside}
