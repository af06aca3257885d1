"""The map of the repository is true: what it names exists, and its picture is the order that the imports keep."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from operator import attrgetter
from pathlib import Path

import pytest

from tests.test_house.import_map import FLOORS, arrows, modules, room_of

from .pages import PAGES, ROOT, shown

DEVELOPER = ROOT / "docs" / "developer"
MAP, README = DEVELOPER / "map.md", ROOT / "README.md"
NAMING = [MAP, DEVELOPER / "life-of-a-linear.md", DEVELOPER / "design.md"]
PLUGIN_OF_THE_TUTORIAL = "outlier_rounding/"
SOURCES = ("quad_modifiers", "quad_peft", "kernels", "tests")
# Names of other libraries that the pages use.
OTHERS = {
    "nn.Linear": "torch",
    "state_dict": "torch.nn:Module",
    "oneshot": "llmcompressor",
    "SmoothQuantModifier": "llmcompressor.modifiers.transform.smoothquant",
    "save_pretrained": "transformers:PreTrainedModel",
}

_SPAN = re.compile(r"`([^`\n]+)`")
_FENCED = re.compile(r"^```.*?^```$", re.S | re.M)
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def prose(page: Path) -> str:
    return re.sub(r"\s*\n(?!\n)", " ", _FENCED.sub("", page.read_text(encoding="utf-8")))


def pictures(page: Path) -> str:
    return "\n".join(re.findall(r"^```text\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M))


def is_path(span: str) -> bool:
    return re.fullmatch(r"[\w./-]+", span) is not None and ("/" in span or span.endswith((".py", ".md", ".yaml")))


@cache
def defined(file: Path) -> frozenset[str]:
    """Names that a file defines: functions, classes, their members also as `Class.member`, assigned names."""
    return frozenset(_defined(ast.parse(file.read_text(encoding="utf-8")), ""))


def _defined(tree: ast.AST, owner: str) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        names: list[str] = []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
            yield from _defined(node, node.name if isinstance(node, ast.ClassDef) else owner)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
            names += [target.attr for target in targets if isinstance(target, ast.Attribute)]
        else:
            yield from _defined(node, owner)
        for name in names:
            yield name
            if owner:
                yield f"{owner}.{name}"


def files_of(path: str) -> list[Path]:
    place = ROOT / path
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


@cache
def anywhere() -> frozenset[str]:
    files = [file for source in SOURCES for file in files_of(source)]
    return frozenset(name for file in files for name in defined(file))


def problem(name: str, path: str | None) -> str | None:
    """Returns what is wrong with a name, which the page says `path` defines, or any file without one."""
    if path is None or not path.endswith((".py", "/")):
        known = name in anywhere() or name in OTHERS or any(f".{room}".endswith(f".{name}") for room in FLOORS)
        return None if known else f"nothing defines {name}"
    known = any(name in defined(file) for file in files_of(path))
    return None if known else f"{path} does not define {name}"


def named(text: str) -> Iterator[tuple[str, str | None]]:
    """Yields the names of a text with the file that it says defines them.

    A file defines the names in brackets after it; `name` in `file`, `name`, `file` and `name` (`file`) say so too. A
    test in brackets holds what is said.
    """
    spans = list(_SPAN.finditer(text))
    for index, span in enumerate(spans):
        if is_path(span[1]) or _NAME.fullmatch(span[1]) is None:
            continue
        following = spans[index + 1] if index + 1 < len(spans) else None
        between = "" if following is None else text[span.end() : following.start()]
        source = following is not None and is_path(following[1]) and not following[1].startswith("tests/")
        if following is not None and source and re.fullmatch(r" in |, | \(", between):
            yield span[1], following[1]
            continue
        before = re.search(r"`([\w./-]+)` \((?:`[^`]+`, )*$", text[: span.start()])
        yield span[1], before[1] if before is not None and is_path(before[1]) else None


@pytest.mark.parametrize("page", [*NAMING, README, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_files_of_the_page_exist(page: Path) -> None:
    paths = [span for span in _SPAN.findall(prose(page)) if is_path(span) and "/" in span]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_files_that_other_pages_name_exist() -> None:
    roots = (ROOT, *(ROOT / each for each in ("quad_modifiers", "kernels", "kernels/quad_kernels")))
    for page in PAGES:
        named = [span for span in _SPAN.findall(prose(page)) if is_path(span) and "/" in span and span.endswith(".py")]
        missing = [path for path in named if not any((root / path).exists() for root in roots)]
        assert [path for path in missing if not path.startswith(PLUGIN_OF_THE_TUTORIAL)] == [], shown(page)


@pytest.mark.parametrize("page", NAMING, ids=lambda page: page.name)
def test_names_of_the_page_exist(page: Path) -> None:
    found = list(named(prose(page)))
    assert len(found) > 15
    assert [text for text in (problem(*each) for each in found) if text is not None] == []


@pytest.mark.parametrize("page", NAMING[1:], ids=lambda page: page.name)
def test_functions_and_classes_in_pictures_exist(page: Path) -> None:
    text = pictures(page)
    names = re.findall(r"([A-Za-z_][\w.]*)\(\)", text) + re.findall(r"\b[A-Z][a-z]*[A-Z]\w*\b", text)
    assert names
    assert [name for name in names if problem(name, None) is not None] == []


def test_the_names_of_other_libraries_exist() -> None:
    missing = []
    for name, owner in OTHERS.items():
        module, _, attribute = owner.partition(":")
        path = f"{attribute}.{name}" if attribute else name
        try:
            attrgetter(path)(importlib.import_module(module))
        except AttributeError:
            missing.append(f"{module}.{path}")
    assert missing == []


def floors() -> list[list[str]]:
    """The rooms of the picture, from the ground up."""
    package, found = "", {}
    for line in pictures(MAP).splitlines():
        floor = re.fullmatch(r" +(\d+)  (\S+(?: · \S+)*)(?:  .*)?", line)
        if floor is None:
            package = line
            continue
        rooms = [room if room == package else f"{package}.{room}" for room in floor[2].split(" · ")]
        found[int(floor[1])] = rooms
    return [found[number] for number in range(len(found))]


def test_the_picture_is_the_order_of_the_rooms() -> None:
    assert [room for floor in floors() for room in floor] == list(FLOORS)


def test_rooms_of_one_floor_do_not_import_each_other() -> None:
    floor_of = {room: number for number, floor in enumerate(floors()) for room in floor}
    between = {(room_of(arrow.source), room_of(arrow.target)) for arrow in arrows(modules())}
    beside = [(a, b) for a, b in between if a != b and floor_of[a] == floor_of[b]]
    assert beside == []


def test_what_does_not_exist_is_noticed() -> None:
    missing = (
        "`Nothing.at_all` in `quad_modifiers/nn/forward.py`, `quad_modifiers/nn/forward.py` (`linear_forward`, `gone`)"
    )
    assert [problem(*each) for each in named(missing)] == [
        "quad_modifiers/nn/forward.py does not define Nothing.at_all",
        None,
        "quad_modifiers/nn/forward.py does not define gone",
    ]
    assert problem("no_such_function", None) == "nothing defines no_such_function"


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
