"""Which linears of a decoder a modifier would reach, told from its `targets` and `ignore` without a model.

The names are those of the known architectures. After a projection, a linear that reads the residual
stream is a container whose children `outlier` and `residual` are linears.
"""

import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from quad_modifiers.model.architecture import Architecture
from quad_modifiers.plugins.contributions import architectures

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme
    from llmcompressor.modifiers import Modifier
    from torch.nn import Module

LAYERS = 64
"""Layers in the sample; targets that name one layer beyond it are taken to reach nothing."""


# A pattern without digits, whose single dots stand between letters: numbers of layers stand between two dots.
_BLIND = re.compile(r"(?:re:)?(?:\.\*|\\\.|[A-Za-z_]|(?<=[A-Za-z_])\.(?=[A-Za-z_]))*\$?")


def linear_names(roles: Iterable[str] | None = None, child: str = "") -> tuple[str, ...]:
    """Returns the names of linears in every layer of every known architecture, or of their children `child`.

    All `roles` by default, else those named, such as "down_proj"; `child` is one of the containers that a projection
    makes.
    """
    return _linear_names(tuple(architectures().values()), None if roles is None else frozenset(roles), child)


@functools.cache
def _linear_names(known: tuple[Architecture, ...], roles: frozenset[str] | None, child: str) -> tuple[str, ...]:
    end = f".{child}" if child else ""
    paths = dict.fromkeys(
        (architecture.layers, f"{group.parent}.{member.name}".replace("*", "0"))
        for architecture in known
        for group, member in architecture.quantized_members()
        if roles is None or member.role in roles
    )
    return tuple(f"{layers}.{layer}.{path}{end}" for layer in range(LAYERS) for layers, path in paths)


def weight_names() -> tuple[str, ...]:
    """Returns the names of the linears that hold the weights to quantize, in containers or not, and of the heads."""
    heads = dict.fromkeys(architecture.head for architecture in architectures().values())
    return (*linear_names(), *linear_names(child="residual"), *heads)


def table_names() -> tuple[str, ...]:
    """Returns the names of the embeddings and heads of the known architectures."""
    return tuple(dict.fromkeys(path for known in architectures().values() for path in (known.embedding, known.head)))


def outlier_names(projection: "Modifier") -> tuple[str, ...]:
    """Returns the names of the full-precision outlier linears that a projection adds.

    `rank` above zero adds them to the linears that read the stream, `down_proj_rank` to down_proj, and so on; a
    projection with no field of that kind is taken to add them to the readers of the stream.
    """
    ranks = [name for name in type(projection).model_fields if name == "rank" or "_rank" in name]
    groups = {role: group for known in architectures().values() for role, group in known.roles().items()}
    readers = {role for role, group in groups.items() if group.reads == "stream"}
    roles = set() if ranks and not getattr(projection, "rank", 0) else readers
    for role in set(groups) - readers:
        if any(name.startswith(f"{role}_rank") and getattr(projection, name) for name in ranks):
            roles.add(role)
    return linear_names(roles, "outlier")


def matching(names: Iterable[str], targets: Iterable[str], ignore: Iterable[str]) -> set[str]:
    """Returns the names that compressed-tensors would match, each taken to be a `torch.nn.Linear`."""
    import torch

    return _matching(torch.nn.Linear(1, 1, device="meta"), names, targets, ignore)


def matching_tables(names: Iterable[str], targets: Iterable[str], ignore: Iterable[str]) -> set[str]:
    """Returns the names that compressed-tensors would match, each taken to be a `torch.nn.Embedding`."""
    import torch

    return _matching(torch.nn.Embedding(1, 1, device="meta"), names, targets, ignore)


def matching_containers(targets: Iterable[str], ignore: Iterable[str]) -> set[str]:
    """Returns the names of the containers that a projection makes and that the targets name themselves.

    A target that matches the children as well ("re:.*q_proj.*") is not counted: it is meant for them.
    """
    import torch

    residual = linear_names(child="residual")
    own = [target for target in targets if not matching(residual, [target], [])]
    return _matching(torch.nn.Module(), linear_names(), own, ignore)


def _matching(module: "Module", names: Iterable[str], targets: Iterable[str], ignore: Iterable[str]) -> set[str]:
    from compressed_tensors.utils.match import is_match

    targets, ignore = list(targets), list(ignore)
    return {name for name in names if is_match(name, module, targets, ignore)}


def tells_layers_apart(modifier: "Modifier") -> bool:
    """Returns whether `targets` or `ignore` of a modifier could name a linear in one layer and not in another."""
    given = (getattr(modifier, name, None) or [] for name in ("targets", "ignore"))
    patterns = [pattern for some in given for pattern in ([some] if isinstance(some, str) else some)]
    patterns += [target for scheme in stock_schemes(modifier) for target in scheme.targets]
    return not all(_BLIND.fullmatch(pattern) for pattern in patterns)


def stock_schemes(modifier: "Modifier") -> "list[QuantizationScheme]":
    """Returns the quantization schemes of one of llm-compressor's quantizing modifiers, none for any other."""
    from llmcompressor.modifiers.quantization import QuantizationMixin

    if not isinstance(modifier, QuantizationMixin):
        return []
    return list(modifier.resolved_config.config_groups.values())


def is_ignored(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether the `ignore` of one of our modifiers names a linear.

    Args:
        name: full name of the linear.
        patterns: last parts of names, such as "down_proj" or "self_attn.q_proj", or "re:" and a regular expression.
    """
    return any(
        re.match(pattern[3:], name) is not None if pattern.startswith("re:") else f".{name}".endswith(f".{pattern}")
        for pattern in patterns
    )


def covered(modifier: "Modifier", part: str, names: tuple[str, ...]) -> set[str]:
    """Returns which of `names` a modifier quantizes; `part` is "weights" or "input_activations"."""
    from llmcompressor.modifiers.quantization import QuantizationMixin

    ignore = getattr(modifier, "ignore", None)
    if isinstance(modifier, QuantizationMixin):
        targets = [target for each in stock_schemes(modifier) if getattr(each, part) for target in each.targets]
        return matching(names, targets, ignore or [])
    if ignore is None:
        ignore = list(getattr(type(modifier), "ignored_by_default", ("lm_head",)))
    kept = tuple(name for name in names if not is_ignored(name.removesuffix(".residual"), ignore))
    return matching(kept, getattr(modifier, "targets", None) or ["Linear"], ignore)
