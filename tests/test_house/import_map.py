"""The import map of the packages: every import in the source, also those inside functions, as arrows between rooms.

`python tests/test_house/import_map.py [ROOT]` prints the map of a checkout: rooms, arrows, arrows back up, circles.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "quad_kernels": "kernels/quad_kernels",
    "quad_modifiers": "quad_modifiers",
    "quad_peft": "quad_peft",
}

DIVIDED = ("quad_kernels", "quad_modifiers")  # packages whose every module is in a room below them

# From the ground up: a room may import rooms that stand before it. A room is a module or package with everything below
# it that is not a room of its own.
FLOORS = (
    "quad_kernels.processor",
    "quad_kernels.whole_numbers",
    "quad_kernels.early_launch",
    "quad_kernels.packing",
    "quad_kernels.float4",
    "quad_kernels.formats",
    "quad_kernels.layouts",
    "quad_kernels.weight",
    "quad_kernels.triton_grid",
    "quad_kernels.hadamard",
    "quad_kernels.quantize_activations",
    "quad_kernels.integer_linear",
    "quad_kernels.int4_kv",
    "quad_kernels.elementwise",
    "quad_kernels.table_product",
    "quad_kernels.weight_rounding",
    "quad_kernels.native",
    "quad_kernels.backends",
    "quad_kernels.ops",
    "quad_kernels.block",
    "quad_kernels.functional",
    "quad_kernels.rounding",
    "quad_kernels.quad_linear",
    "quad_kernels._renamed",
    "quad_kernels",
    "quad_modifiers._moved",
    "quad_modifiers.version",
    "quad_modifiers.torchrun",
    "quad_modifiers.output_folder",
    "quad_modifiers.process_state",
    "quad_modifiers.on_disk",
    "quad_modifiers.linalg",
    "quad_modifiers.nn",
    "quad_modifiers.model",
    "quad_modifiers.reporting",
    "quad_modifiers.ranks",
    "quad_modifiers.plugins",
    "quad_modifiers.data",
    "quad_modifiers.journal",
    "quad_modifiers.quantization",
    "quad_modifiers.passes",
    "quad_modifiers.projection",
    "quad_modifiers.checkpoint.format",
    "quad_modifiers.records",
    "quad_modifiers.checkpoint",
    "quad_modifiers.recipe",
    "quad_modifiers.modifiers",
    "quad_modifiers.builtin",
    "quad_modifiers.oneshot_arguments",
    "quad_modifiers.before_compression",
    "quad_modifiers.compression_size",
    "quad_modifiers.compression",
    "quad_modifiers.compression_plan",
    "quad_modifiers.vllm_plugin",
    "quad_modifiers.connect",
    "quad_modifiers",
    "quad_peft",
    "quad_modifiers.tools",
    "quad_modifiers.tools.brief_waiting",
    "quad_modifiers.tools.console",
    "quad_modifiers.tools.support_table",
    "quad_modifiers.tools.hub_errors",
    "quad_modifiers.tools.evaluation",
    "quad_modifiers.tools.publishing",
    "quad_modifiers.tools.inspection",
    "quad_modifiers.tools.demo",
    "quad_modifiers.tools.bench",
    "quad_modifiers.tools.suggestion",
    "quad_modifiers.tools.cli",
    "quad_modifiers.__main__",
)


class Arrow(NamedTuple):
    """One import: a module and the module that it imports."""

    source: str
    target: str


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Returns the source file of every module of the packages, by dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted((root / folder).rglob("*.py")):
            parts = [package, *file.relative_to(root / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def arrows(files: dict[str, Path]) -> list[Arrow]:
    """Returns every import of one of our modules by another, once.

    Raises:
        ValueError: if an import is relative.
    """
    found = set()
    for name, file in files.items():
        for target in _imports(ast.parse(file.read_text(encoding="utf-8")), files):
            if target != name:
                found.add(Arrow(name, target))
    return sorted(found)


def _imports(tree: ast.AST, files: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            if node.level != 0:
                raise ValueError(f"line {node.lineno}: a relative import is not on the map; write the full name")
            for alias in node.names:
                named = (f"{node.module}.{alias.name}", node.module)
                yield from [module for module in named if module in files][:1]


def room_of(module: str, floors: tuple[str, ...] = FLOORS) -> str:
    """Returns the room of a module.

    Raises:
        ValueError: if no room holds it.
    """
    rooms = [room for room in floors if module == room or module.startswith(f"{room}.")]
    if not rooms:
        raise ValueError(f"{module} is in no room; add one to FLOORS")
    room = max(rooms, key=len)
    if room in DIVIDED and module != room:
        raise ValueError(f"{module} is in no room of {room}; add one to FLOORS")
    return room


def back_up(found: list[Arrow], floors: tuple[str, ...] = FLOORS) -> list[Arrow]:
    """Returns the imports of a room that stands above the importing one."""
    place = {room: index for index, room in enumerate(floors)}
    return [a for a in found if place[room_of(a.source, floors)] < place[room_of(a.target, floors)]]


def circles(found: list[Arrow]) -> list[list[str]]:
    """Returns the groups of modules that import each other, in a circle of any length (Tarjan's algorithm)."""
    targets: dict[str, list[str]] = {}
    for arrow in found:
        targets.setdefault(arrow.source, []).append(arrow.target)
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in targets.get(module, ()):
            if target not in order:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], order[target])
        if lowest[module] == order[module]:
            start = stack.index(module)
            group = sorted(stack[start:])
            del stack[start:]
            if len(group) > 1:
                groups.append(group)

    for module in sorted(targets):
        if module not in order:
            visit(module)
    return sorted(groups)


def summary(root: Path = ROOT) -> str:
    """Returns the map in four numbers and the list of what runs against the order."""
    files = modules(root)
    found = arrows(files)
    between = {(room_of(a.source), room_of(a.target)) for a in found} - {(room, room) for room in FLOORS}
    wrong = back_up(found)
    groups = circles(found)
    lines = [
        f"rooms {len({room_of(name) for name in files})}",
        f"arrows between rooms {len(between)}",
        f"arrows back up {len({(room_of(a.source), room_of(a.target)) for a in wrong})} ({len(wrong)} imports)",
        f"circles {len(groups)}" + (f" (of {', '.join(str(len(group)) for group in groups)} files)" if groups else ""),
        *(f"  back up: {arrow.source} -> {arrow.target}" for arrow in wrong),
        *(f"  circle: {' '.join(group)}" for group in groups),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
