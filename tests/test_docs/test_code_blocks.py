"""The documentation is true: its Python blocks run, its recipes validate, its links lead somewhere.

A page's blocks share one namespace and run top to bottom in a folder with `model/` (a toy Llama with tokenizer),
`text.txt` and, where the page has a recipe, `recipe.yaml`. `<!-- no-test -->` on the line before a block leaves it out.
docs/developer/plugins.md has a test of its own, tests/test_plugins/test_docs.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from quad_modifiers.plugins import get_plugin_manager
from quad_modifiers.recipe import validate_recipe

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TESTED_ELSEWHERE = ROOT / "docs" / "developer" / "plugins.md"
_BLOCK = re.compile(r"(?P<before>[^\n]*\n)?^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^ *```$", re.S | re.M)
_SKIP = "<!-- no-test -->"


@dataclass(frozen=True)
class Block:
    """A code block; `line` is the line of its first line of code."""

    page: Path
    language: str
    text: str
    line: int
    skipped: bool


def blocks(page: Path, language: str) -> Iterator[Block]:
    """Yield the code blocks of a page in one language, without their indentation."""
    source = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(source):
        if match["language"] == language:
            text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M)
            line = source.count("\n", 0, match.start("text")) + 1
            yield Block(page, language, text, line, _SKIP in (match["before"] or ""))


def recipes(page: Path) -> list[Block]:
    """Return the YAML blocks of a page that are recipes."""
    return [block for block in blocks(page, "yaml") if "_modifiers:" in block.text and not block.skipped]


def shown(page: Path) -> str:
    return str(page.relative_to(ROOT))


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
def workplace(make_toy, toy_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("_own_plugins")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=shown)
def test_python_blocks_run(page: Path, workplace: Path) -> None:
    for recipe in recipes(page)[:1]:
        (workplace / "recipe.yaml").write_text(recipe.text)
    namespace = {"__name__": "documentation"}
    for block in blocks(page, "python"):
        if not block.skipped:
            padded = "\n" * (block.line - 1) + block.text  # tracebacks then show the line of the page
            exec(compile(padded, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in OURS if recipes(page)], ids=shown)
def test_recipes_validate(page: Path) -> None:
    for block in recipes(page):
        assert validate_recipe(block.text) == [], f"{shown(page)}:{block.line}"


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
