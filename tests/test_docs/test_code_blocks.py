"""The documentation is true: its Python blocks run, its recipes validate, its links lead somewhere.

A page's blocks share one namespace and run top to bottom in a folder with `model/` (a toy Llama with tokenizer),
`text.txt` and, where the page has a recipe, `recipe.yaml`. On the line before a block, `<!-- no-test -->` leaves it out
and `<!-- file: package/module.py -->` writes it to that file, from which later blocks can import.
docs/developer/plugins.md has a test of its own, tests/test_plugins/test_docs.py.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quad_modifiers.plugins import get_plugin_manager
from quad_modifiers.recipe import validate_recipe

from .pages import PAGES, ROOT, Block, blocks, recipes, shown

TESTED_ELSEWHERE = ROOT / "docs" / "developer" / "plugins.md"
OURS = [page for page in PAGES if page != TESTED_ELSEWHERE]
WITH_PYTHON = [page for page in OURS if any(not block.skipped for block in blocks(page, "python"))]


@pytest.fixture
def _own_plugins() -> Iterator[None]:
    """Undo what a page registers."""
    manager = get_plugin_manager()
    before = {name for name, _ in manager.list_name_plugin()}
    yield
    for name, _ in manager.list_name_plugin():
        if name not in before:
            manager.unregister(name=name)


@pytest.fixture
def workplace(make_toy, toy_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that docs/index.md promises to the blocks, as the current one."""
    make_toy("llama", hidden_size=128).save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "outputs").mkdir()  # where `make demo` leaves its model, which README.md goes on with
    (tmp_path / "outputs" / "SmolLM2-135M").symlink_to(tmp_path / "model")
    text = "Seven wizards mixed a jug of potent black liquid, measured it twice, and wrote the result down.\n"
    (tmp_path / "text.txt").write_text("".join(f"{i}. {text}" for i in range(200)))
    search_path = [str(Path(each).absolute()) for each in os.environ.get("PYTHONPATH", "").split(os.pathsep) if each]
    if search_path:  # relative entries would be lost to the processes that a block starts
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(search_path))
    monkeypatch.setenv("QUAD_EVALUATION_CACHE", str(tmp_path / "kept"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as in an interactive Python that was started here
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def run(page: Path, folder: Path) -> tuple[list[Block], dict[str, Any]]:
    """Runs the blocks of a page, and returns those that ran and the names they left."""
    for recipe in recipes(page)[:1]:
        (folder / "recipe.yaml").write_text(recipe.text)
    ran: list[Block] = []
    namespace: dict[str, Any] = {"__name__": "documentation"}
    for block in blocks(page, "python"):
        if block.file is not None:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text)
        elif not block.skipped:
            padded = "\n" * (block.line - 1) + block.text  # tracebacks then show the line of the page
            exec(compile(padded, str(page), "exec"), namespace)
            ran.append(block)
    return ran, namespace


def names_bound(block: Block) -> set[str]:
    """Names that the top level of a block assigns, imports or defines."""
    bound: set[str] = set()
    for statement in ast.parse(block.text).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            bound |= {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            bound.add(statement.name)
        elif isinstance(statement, ast.Assign):
            bound |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return bound


@pytest.mark.usefixtures("_own_plugins")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=shown)
def test_python_blocks_run(page: Path, workplace: Path) -> None:
    source = page.read_text(encoding="utf-8")
    ran, namespace = run(page, workplace)
    marked = len(re.findall(r"<!-- (?:no-test|file: .*) -->\n *```python", source))
    assert len(ran) == len(re.findall(r"^ *```python$", source, re.M)) - marked > 0
    missing = {name for block in ran for name in names_bound(block)} - namespace.keys()
    assert not missing


@pytest.mark.parametrize("page", [page for page in OURS if recipes(page)], ids=shown)
def test_recipes_validate(page: Path) -> None:
    # A modifier that the page itself writes is registered, and its recipe validated, by the page.
    own = {name for block in blocks(page, "python") if block.file for name in names_bound(block)}
    others = [block for block in recipes(page) if not own & set(re.findall(r"^    (\w+):", block.text, re.M))]
    assert {block.line: validate_recipe(block.text) for block in others} == {block.line: [] for block in others}


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{shown(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{shown(page)} links to {target}, of {sorted(anchors(file))}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, made as GitHub makes them."""
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_linked_from_the_index() -> None:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in PAGES:
        if page.parent != ROOT and page.name != "index.md":
            assert f"({page.relative_to(ROOT / 'docs')})" in text, shown(page)
