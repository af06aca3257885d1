"""A private name is not an interface of a test: what a test needs to see has a return value or a public name."""

import ast
from collections.abc import Iterator

import pytest

from .import_map import ROOT

OURS = ("quad_modifiers", "quad_kernels", "quad_peft", "benchmarks")
PATCHING = ("setattr", "delattr", "object", "patch")


def private_patches(source: str) -> Iterator[str]:
    """Yields what a test file patches under a private name of ours."""
    tree = ast.parse(source)
    origin = dict(_imported(tree))
    for call in ast.walk(tree):
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in PATCHING):
            continue
        match call.args:
            case [ast.Constant(value=str(path)), *_]:
                target = path
            case [target_object, ast.Constant(value=str(name)), *_]:
                owner = ast.unparse(target_object)
                first, _, rest = owner.partition(".")
                target = ".".join(filter(None, (origin.get(first, f"{OURS[0]}.{first}"), rest, name)))
            case _:
                continue
        parts = target.split(".")
        if parts[0] in OURS and any(part.startswith("_") and not part.startswith("__") for part in parts):
            yield target


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def test_no_test_patches_a_private_name_of_ours() -> None:
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "tests").rglob("*.py")):
        patches = list(private_patches(file.read_text(encoding="utf-8")))
        if patches:
            found.setdefault(file.parent.name, []).extend(f"{file.name}: {patch}" for patch in patches)
    assert found == {}, "give the code a public point instead"


@pytest.mark.parametrize(
    ("patch", "seen"),
    [
        ("monkeypatch.setattr('quad_modifiers.compression._load', None)", True),
        ("monkeypatch.setattr('quad_modifiers.compression.oneshot', None)", False),
        ("monkeypatch.setattr(registry, '_backends', {})", True),
        ("monkeypatch.setattr(registry, 'backends', {})", False),
        ("monkeypatch.setattr(registry._state, 'backends', {})", True),
        ("monkeypatch.setattr(ModifierFactory, '_loaded', False)", False),
        ("monkeypatch.setattr(stand_in, '_loaded', False)", True),
        ("mock.patch.object(registry, '_backends')", True),
    ],
)
def test_what_counts_as_a_patch(patch: str, seen: bool) -> None:
    imports = "from quad_kernels import registry\nfrom llmcompressor.modifiers import ModifierFactory\n"
    assert bool(list(private_patches(imports + patch))) == seen
