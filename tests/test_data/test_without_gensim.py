"""Where gensim cannot be had: the small default text, under its own name; and what still needs the articles says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import quad_modifiers
from quad_modifiers.data.python_reference import reference_pages

ROOT = Path(quad_modifiers.__file__).parents[1]
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gensim":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", BLOCK + code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


TEXTS = """
import logging
from quad_modifiers.data import calibration_texts, held_out_name, held_out_prose, stdlib_code
from quad_modifiers.data.calibration_texts import default_text_name
from quad_modifiers.tools.evaluation.perplexity_text import perplexity_text, text_name

logging.basicConfig(format="%(message)s")
texts = calibration_texts()
assert sum(map(len, texts)) > 250_000
assert any("def " in text for text in texts)
assert not set(texts) & set(held_out_prose())
assert "gensim" not in sys.modules
print(default_text_name())
print(held_out_name())
print(text_name("wikipedia"), len(perplexity_text("wikipedia").texts) > 10)
"""


def test_the_small_text_steps_in_under_its_own_name() -> None:
    done = run(TEXTS)
    assert done.returncode == 0, done.stderr
    default, held_out, evaluated = done.stdout.splitlines()
    assert "pages of Python's language reference" in default
    assert "without gensim" in default
    assert held_out == "held-out pages of Python's language reference"
    assert evaluated == f"{held_out} True"
    assert "pip install 'quad-modifiers[text]'" in done.stderr
    assert "--dataset" in done.stderr


ARTICLES = """
from quad_modifiers.tools.cli import main
raise SystemExit(main(["eval", sys.argv[1], "--tasks", "quad_lastword", "--no-perplexity", "-o", sys.argv[2]]))
"""


def test_tasks_made_of_the_articles_name_the_extra(quad_checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    done = run(ARTICLES, quad_checkpoint, tmp_path / "out.json")
    assert done.returncode == 1
    assert "quad-modifiers[text]" in done.stderr
    assert "tasks that need no network" in done.stderr


COMPRESSION = """
from quad_modifiers.tools.cli import main
raise SystemExit(main(["compress", *sys.argv[1:]]))
"""
RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    OutlierSplitGPTQ: {bits: 4, method: rtn}
"""


def test_a_compression_says_which_text_it_took(toy_checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    from quad_modifiers.records.calibration_record import read_calibration
    from quad_modifiers.tools.publishing import plan

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    output = tmp_path / "out"
    size = ("--samples", 6, "--seq-length", 256)
    done = run(COMPRESSION, toy_checkpoint("llama"), recipe, "-o", output, *size)
    assert done.returncode == 0, done.stderr
    assert "gensim is not installed, so pages of Python's language reference stand in" in done.stderr
    record = read_calibration(output)
    assert record is not None
    assert "Python's language reference" in record.sources[0].name
    card = plan(output, "me/toy", check=False).card
    assert f"| {record.sources[0].name} | text | 100 % |" in card


def test_the_halves_of_the_pages_share_no_passage() -> None:
    calibration, held_out = (
        {passage for page in reference_pages(part) for passage in page.split("\n\n")}
        for part in ("calibration", "held_out")
    )
    assert not calibration & held_out
    assert sum(map(len, held_out)) > 100_000
    with pytest.raises(ValueError, match="'calibration' or 'held_out', not 'test'"):
        reference_pages("test")
