"""Reads recipe text into entries with line numbers, and finds what llm-compressor would silently drop.

llm-compressor reads `*_stage:` -> `*_modifiers:` -> modifier name -> fields, and skips everything else
without a word. Here every such part becomes a `Problem`.
"""

import difflib
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from quad_modifiers.recipe.problems import Problem

STAGE_SUFFIX = "_stage"
GROUP_SUFFIX = "_modifiers"
_FORM = "write quad_stage: -> quad_modifiers: -> ModifierName: -> fields, each level a mapping"


@dataclass(frozen=True)
class ModifierEntry:
    """One modifier of a recipe text, with the YAML node of its fields for line numbers."""

    name: str
    group: str
    fields: dict[str, Any]
    line: int
    node: yaml.Node

    def line_of(self, location: tuple[int | str, ...]) -> int:
        """Returns the line of a field, given as in pydantic's errors: as deep as the text follows it."""
        node, line = self.node, self.line
        for step in location:
            if isinstance(node, yaml.MappingNode):
                found = {name: (key, value) for name, key, value in _last_pairs(node)}.get(str(step))
            else:
                items = node.value if isinstance(node, yaml.SequenceNode) else []
                found = (items[step], items[step]) if isinstance(step, int) and step < len(items) else None
            if found is None:
                break
            line, node = _line(found[0]), found[1]
        return line


@dataclass
class RecipeDocument:
    """The modifier entries of a recipe text in order, and the problems of its structure."""

    entries: list[ModifierEntry] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def report(self, node: yaml.Node, message: str, remedy: str) -> None:
        """Adds an error at the line of `node`."""
        self.problems.append(Problem(_line(node), message, remedy))


def parse_recipe(text: str) -> RecipeDocument:
    """Returns the modifier entries of a recipe in YAML (or JSON), with every problem of its structure."""
    document = RecipeDocument()
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            document.problems.append(Problem(1, "the recipe is empty", _FORM))
            return document
        _report_duplicates(root, document, set())
        loader.construct_document(root)  # applies merge keys in place, and refuses tags that are not plain YAML
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        reason = getattr(error, "problem", None) or str(error)
        remedy = "Check the indentation (spaces, no tabs), quotes and colons"
        document.problems.append(Problem(mark and mark.line + 1, f"not valid YAML: {reason}", remedy))
        return document
    _read_root(root, document)
    return document


def _read_root(root: yaml.Node, document: RecipeDocument) -> None:
    if not isinstance(root, yaml.MappingNode):
        document.report(root, f"a recipe must be a mapping, not {_kind(root)}", _FORM)
        return
    stages = 0
    for name, key, value in _last_pairs(root):
        if not name.endswith(STAGE_SUFFIX):
            document.report(key, f"llm-compressor drops the top-level key {name!r}", _remedy_for_root_key(name))
        elif not isinstance(value, yaml.MappingNode):
            document.report(key, f"llm-compressor drops stage {name!r}, which is {_kind(value)}", _FORM)
        elif stages:
            document.report(
                key,
                f"{name!r} is a second stage; a recipe with several stages is saved in a form that cannot be read",
                "Put all modifiers into one stage, in the order in which they run",
            )
        else:
            _read_stage(name, value, document)
        stages += name.endswith(STAGE_SUFFIX)
    if not document.entries and not document.problems:
        document.report(root, "the recipe contains no modifier", _FORM)


def _read_stage(stage: str, node: yaml.MappingNode, document: RecipeDocument) -> None:
    for name, key, value in _last_pairs(node):
        if not name.endswith(GROUP_SUFFIX):
            document.report(
                key,
                f"llm-compressor drops {name!r} in {stage!r}: only keys that end in {GROUP_SUFFIX!r} are read",
                f"Put modifiers under {_with_suffix(name, GROUP_SUFFIX)!r}, and remove anything else",
            )
        elif not isinstance(value, yaml.MappingNode):
            document.report(
                key,
                f"llm-compressor drops {name!r}, which is {_kind(value)}: modifiers are read from a mapping only",
                "Write each modifier as 'ModifierName:' with its fields indented below, without a leading '-'",
            )
        else:
            _read_group(name.removesuffix(GROUP_SUFFIX), value, document)


def _read_group(group: str, node: yaml.MappingNode, document: RecipeDocument) -> None:
    for name, key, value in _last_pairs(node):
        if not isinstance(value, yaml.MappingNode):
            document.report(
                key,
                f"the fields of {name} must be a mapping, not {_kind(value)}",
                f"Write '{name}: {{}}' for the default values, or indent the fields below it",
            )
            continue
        loader = yaml.SafeLoader("")
        fields = {_text(name): loader.construct_object(given, deep=True) for name, given in value.value}
        if "group" in fields:
            document.report(
                key,
                f"{name} has the field 'group', which llm-compressor takes from the name of the group",
                f"Remove it and name the group '<group>{GROUP_SUFFIX}' instead",
            )
            del fields["group"]
        document.entries.append(ModifierEntry(name, group, fields, _line(key), value))


def _report_duplicates(node: yaml.Node, document: RecipeDocument, seen: set[int]) -> None:
    """Reports every key that occurs twice in one mapping, of which YAML silently keeps the last."""
    if id(node) in seen:
        return
    seen.add(id(node))
    first: dict[str, yaml.Node] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        name = _text(key)
        if name in first and name != "<<":
            document.report(
                key,
                f"{name!r} occurs twice (first in line {_line(first[name])}); YAML silently keeps only the last",
                "Remove one of the two; to run one modifier twice, put it into a second group of the stage",
            )
        first.setdefault(name, key)
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        _report_duplicates(child[1] if isinstance(child, tuple) else child, document, seen)


def _remedy_for_root_key(name: str) -> str:
    if name.endswith(GROUP_SUFFIX):
        return f"Indent it below a stage: 'quad_stage:' and then '{name}:'"
    if name[:1].isupper():
        return f"Put {name} into a stage and a group: {_FORM}"
    if _is_nearly(name, STAGE_SUFFIX):
        return f"Rename it to {_with_suffix(name, STAGE_SUFFIX)!r}"
    return f"Remove it; {_FORM}"


def _is_nearly(name: str, suffix: str) -> bool:
    """Returns whether the last word of `name` is a wrong form of the suffix ("quad_modifer", "stages")."""
    last = re.split(r"[_-]", name.lower())[-1]
    return bool(difflib.get_close_matches(last, [suffix.strip("_")], cutoff=0.7))


def _with_suffix(name: str, suffix: str) -> str:
    """Returns `name` with the suffix, in place of a last word that is a wrong form of it."""
    stem = re.sub(r"[_-]?[^_-]*$", "", name) if _is_nearly(name, suffix) else name
    return f"{stem or 'quad'}{suffix}"


def _last_pairs(node: yaml.MappingNode) -> list[tuple[str, yaml.Node, yaml.Node]]:
    """Returns (name, key, value) as a dict would hold them: at the first place, the last value of a name."""
    last = {_text(key): (key, value) for key, value in node.value}
    return [(name, key, value) for name, (key, value) in last.items()]


def _text(key: yaml.Node) -> str:
    return key.value if isinstance(key, yaml.ScalarNode) else str(key.value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "empty" if node.tag.endswith(":null") else "a single value"
