"""Writes a recipe with overrides: that of the base with its comments, where its form allows it."""

from collections.abc import Sequence

import yaml

from quad_modifiers.recipe.document import GROUP_SUFFIX, STAGE_SUFFIX, ModifierEntry, parse_recipe
from quad_modifiers.tools.suggestion.sensitivities import WIDE, Kind, Part

_MODIFIERS: dict[Kind, str] = {"weights": "OutlierSplitGPTQ", "inputs": "DynamicActQuant"}


def with_overrides(text: str, header: Sequence[str], wide: Sequence[Part]) -> str:
    """Returns the text of a recipe with 8 bits for some parts.

    Args:
        text: of a sound recipe.
        header: lines that come first, as comments.
        wide: the parts.
    """
    for kind, modifier in _MODIFIERS.items():
        parts = [part for part in wide if part.kind == kind]
        if parts:
            entry = next(each for each in parse_recipe(text).entries if each.name == modifier)
            text = _inserted(text, entry, parts) if _is_block(entry) else _rewritten(text, modifier, parts)
    comments = "".join(f"# {line}".rstrip() + "\n" for line in header)
    return f"{comments}#\n{text}" if text.startswith("#") else f"{comments}\n{text}"


def _is_block(entry: ModifierEntry) -> bool:
    return isinstance(entry.node, yaml.MappingNode) and not entry.node.flow_style and bool(entry.node.value)


def _inserted(text: str, entry: ModifierEntry, parts: Sequence[Part]) -> str:
    """With lines of its own before the first field of a modifier."""
    mark = entry.node.start_mark
    indent = " " * mark.column
    lines = [f"{indent}overrides:  # what was measured, alone: divergence at the recipe's bits, then at 8\n"]
    for entry_parts in _by_group(parts):
        lost = sum(part.narrow for part in entry_parts), sum(part.wide for part in entry_parts)
        lines.append(f"{indent}  - {_flow(_override(entry_parts))}  # {lost[0]:.5f}, {lost[1]:.5f} nats\n")
    before = text.splitlines(keepends=True)
    return "".join([*before[: mark.line], *lines, *before[mark.line :]])


def _rewritten(text: str, modifier: str, parts: Sequence[Part]) -> str:
    """As YAML is dumped, which loses the comments."""
    content = yaml.safe_load(text)
    for stage in (stage for key, stage in content.items() if key.endswith(STAGE_SUFFIX)):
        for group in (group for key, group in stage.items() if key.endswith(GROUP_SUFFIX)):
            if modifier in group:
                group[modifier] = {
                    **(group[modifier] or {}),
                    "overrides": [_override(each) for each in _by_group(parts)],
                }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _by_group(parts: Sequence[Part]) -> list[list[Part]]:
    groups: dict[tuple[str, ...], list[Part]] = {}
    for part in parts:
        groups.setdefault(part.roles, []).append(part)
    return list(groups.values())


def _override(parts: Sequence[Part]) -> dict[str, object]:
    """The entry of one group; neighbouring runs of blocks become one range."""
    spans: list[list[int]] = []
    for part in sorted(parts, key=lambda part: part.first):
        if spans and part.first == spans[-1][1] + 1:
            spans[-1][1] = part.last
        else:
            spans.append([part.first, part.last])
    layers: list[int | str] = [first if first == last else f"{first}-{last}" for first, last in spans]
    found: dict[str, object] = {"layers": layers, "linears": list(parts[0].roles), "bits": WIDE}
    return {**found, "clip_ratio": 1.0} if parts[0].kind == "inputs" else found


def _flow(content: object) -> str:
    return yaml.safe_dump(content, default_flow_style=True, sort_keys=False, width=10_000).strip()
