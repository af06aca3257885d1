"""Damages checkpoints and recipes at random, as disks, networks and editors do, and looks whether that is noticed.

`python tests/damage.py CHECKPOINT [--count 10000] [--seed 0]` does it to copies in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from quad_modifiers.recipe import RecipeError, validate_recipe
from quad_modifiers.records.checksums import CHECKSUMS_NAME, damages, need_checksums
from quad_modifiers.records.inventory import data_start, read_header, weight_files

_HANGS = 60  # seconds that no look may take


def flip_a_weight(folder: Path, draw: random.Random) -> str:
    """Flips one bit of a tensor."""
    file = draw.choice(weight_files(folder))
    name, entry = draw.choice([(name, entry) for name, entry in read_header(file).items() if _bytes(entry)])
    begin, end = entry["data_offsets"]
    _flip(file, data_start(file) + draw.randrange(begin, end), draw)
    return name


def flip_a_header(folder: Path, draw: random.Random) -> str:
    """Flips one bit of what says where the tensors are."""
    file = draw.choice(weight_files(folder))
    _flip(file, draw.randrange(data_start(file)), draw)
    return file.name


def cut_weights(folder: Path, draw: random.Random) -> str:
    """Cuts the end off a file of weights."""
    file = draw.choice(weight_files(folder))
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data))])
    return file.name


def exchange_tensors(folder: Path, draw: random.Random) -> str:
    """Exchanges the data of two tensors of one shape."""
    file = draw.choice(weight_files(folder))
    data, start = bytearray(file.read_bytes()), data_start(file)
    places = {name: [start + each for each in entry["data_offsets"]] for name, entry in read_header(file).items()}
    while True:
        one, other = draw.sample(sorted(places), 2)
        (a, b), (c, d) = places[one], places[other]
        if b - a == d - c and data[a:b] != data[c:d]:
            data[a:b], data[c:d] = data[c:d], data[a:b]
            file.write_bytes(data)
            return one


def exchange_files(folder: Path, draw: random.Random) -> str:
    """Gives two shards each other's name, or takes the only one away."""
    files = weight_files(folder)
    if len(files) == 1:
        files[0].unlink()
        return files[0].name.partition(".")[0]
    one, other = draw.sample(files, 2)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return one.name


def edit_a_number(folder: Path, draw: random.Random) -> str:
    """Changes one digit of config.json."""
    return _edit(folder / "config.json", r"\d", draw)


def edit_a_file(folder: Path, draw: random.Random) -> str:
    """Changes one character of another file."""
    names = sorted(json.loads((folder / CHECKSUMS_NAME).read_text())["files"])
    return _edit(folder / draw.choice(names), r".", draw)


def lose_a_file(folder: Path, draw: random.Random) -> str:
    """Removes one file that is not weights."""
    name = draw.choice(sorted(json.loads((folder / CHECKSUMS_NAME).read_text())["files"]))
    (folder / name).unlink()
    return name


DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (
    flip_a_weight,
    flip_a_header,
    cut_weights,
    exchange_tensors,
    exchange_files,
    edit_a_number,
    edit_a_file,
    lose_a_file,
)


def unnoticed(checkpoint: Path, damage: Callable[[Path, random.Random], str], draw: random.Random) -> str | None:
    """Damages a copy of a checkpoint; returns what is wrong with what is said of it, None if it is found and named."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(checkpoint, Path(scratch) / "copy"))
        wanted = need_checksums(copy)
        named = damage(copy, draw)
        start = time.monotonic()
        found = [damage.text for damage in damages(copy, wanted)]
        if time.monotonic() - start > _HANGS:
            return f"{damage.__name__}: it takes too long"
        if not found:
            return f"{damage.__name__} of {named}: silent"
        return None if any(named in text for text in found) else f"{damage.__name__} of {named}: {found}"


def unclear(recipe: str, draw: random.Random) -> str | None:
    """Damages a recipe; returns what it raised that is no `RecipeError` with a line, None if all is well."""
    text = list(recipe)
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(text))
        if draw.random() < 0.5:
            text[place] = draw.choice("0159-:{}[]#'\"\n \tax&*!|>%@`")
        else:
            del text[place : place + draw.randint(1, 20)]
    try:
        validate_recipe("".join(text))
    except RecipeError as error:
        return None if str(error) else "a RecipeError without a word"
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{''.join(text)}"
    return None


def _bytes(entry: dict[str, list[int]]) -> int:
    return entry["data_offsets"][1] - entry["data_offsets"][0]


def _flip(file: Path, place: int, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def _edit(file: Path, pattern: str, draw: random.Random) -> str:
    text = file.read_text(encoding="utf-8")
    found = draw.choice(list(re.finditer(pattern, text)))
    other = draw.choice([c for c in "0123456789" if c != found[0]])
    file.write_text(text[: found.start()] + other + text[found.end() :], encoding="utf-8")
    return file.name


def main() -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, kinds, bad = random.Random(given.seed), Counter(), []
    recipe = (given.checkpoint / "recipe.yaml").read_text(encoding="utf-8")
    for number in range(given.count):
        kind = draw.choice([*DAMAGES, None])
        found = unclear(recipe, draw) if kind is None else unnoticed(given.checkpoint, kind, draw)
        kinds[kind.__name__ if kind else "recipe"] += 1
        if found is not None:
            bad.append(found)
            print(f"{number}: {found}")
    print(
        f"{given.count} damages ({', '.join(f'{n} {name}' for name, n in sorted(kinds.items()))}): {len(bad)} unnoticed"
    )
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
