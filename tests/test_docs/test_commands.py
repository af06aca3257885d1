"""Shell blocks of the documentation use commands, options and make targets that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
from typer.main import get_command

from quad_modifiers.tools.cli.main import app

from .pages import PAGES, ROOT, blocks, shown


def lines() -> Iterator[tuple[str, str]]:
    """Yield place and text of the commands in shell blocks, comments cut off, continued lines joined."""
    for page in PAGES:
        for language in ("bash", "sh", "shell"):
            for block in blocks(page, language):
                for line in block.text.replace("\\\n", " ").splitlines():
                    command = re.sub(r"\s#.*", "", line).strip()
                    if command and not command.startswith("#"):
                        yield f"{shown(page)}: {command}", command


COMMANDS = dict(lines())
QUAD = {place: text for place, text in COMMANDS.items() if re.match(r"(\S*/)?quad ", text)}
MAKE = {place: text for place, text in COMMANDS.items() if text.startswith("make ")}


def unknown(command: str) -> list[str]:
    """Words of a `quad` command that its parser does not know: sub-commands and options."""
    words = shlex.split(command.partition(" > ")[0])[1:]
    parser = get_command(app)
    known = {"--help", "--debug", *(option for each in parser.params for option in each.opts)}
    found = []
    while words and hasattr(parser, "commands"):
        if words[0] in parser.commands:
            parser = parser.commands[words.pop(0)]
            known |= {option for each in parser.params for option in (*each.opts, *each.secondary_opts)}
        else:
            found += [] if words[0].startswith("-") else [words[0]]
            break
    return found + [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]


@pytest.mark.parametrize("place", QUAD)
def test_quad_commands_exist(place: str) -> None:
    assert unknown(QUAD[place]) == []


@pytest.mark.parametrize("place", MAKE)
def test_make_targets_exist(place: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    words = [word for word in MAKE[place].split()[1:] if "=" not in word]
    assert words
    assert set(words) <= set(targets)


def test_commands_are_found_and_wrong_ones_noticed() -> None:
    assert len(QUAD) > 10
    assert unknown("quad compress MODEL quad_w4a4 -o OUT --samples 8") == []
    assert unknown("quad compress MODEL quad_w4a4 --sample 8") == ["--sample"]
    assert unknown("quad squeeze MODEL") == ["squeeze"]
    assert unknown("quad recipes show quad_w4a4 > my_recipe.yaml") == []
