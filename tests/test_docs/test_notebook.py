"""The notebook runs from its first cell to its last, on a toy, and is stored without what it printed.

Its code cells run in one namespace here. nbclient would start a Jupyter kernel for it, with a dozen packages that
nothing else of this project needs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from .pages import ROOT

NOTEBOOK = ROOT / "docs" / "tutorials" / "notebook.ipynb"
RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 8}
    DynamicActQuant: {u_type_bits: 4, d_type_bits: 8}
    OutlierSplitGPTQ: {bits: 4}
"""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"


def cells(kind: str) -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == kind]


@pytest.fixture
def toy(make_toy, toy_tokenizer, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with a toy that has a chat template, for which the environment asks."""
    pytest.importorskip("llmcompressor")
    pytest.importorskip("lm_eval")
    make_toy("llama").save_pretrained(tmp_path / "toy")
    toy_tokenizer.save_pretrained(tmp_path / "toy")
    settings = tmp_path / "toy" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    (tmp_path / "toy.yaml").write_text(RECIPE)
    values = {"MODEL": "toy", "RECIPE": "toy.yaml", "TEXT": text, "OUTPUT": "out", "SAMPLES": 6, "LENGTH": 32}
    for name, value in values.items():
        monkeypatch.setenv(f"QUAD_NOTEBOOK_{name}", str(tmp_path / value) if name == "MODEL" else str(value))
    monkeypatch.setenv("QUAD_EVALUATION_CACHE", str(tmp_path / "kept"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_cell_runs(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(cells("code")):
        exec(compile(source, f"{NOTEBOOK.name}[{number}]", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed
    assert re.search(r"original \d+\.\d\d, compressed \d+\.\d\d, ratio \d", printed)
    assert [message["role"] for message in namespace["messages"]] == ["user", "assistant"] * 2


def test_it_takes_a_real_model_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL", "RECIPE", "TEXT", "OUTPUT", "SAMPLES", "LENGTH"):
        monkeypatch.delenv(f"QUAD_NOTEBOOK_{name}", raising=False)
    namespace: dict[str, Any] = {}
    exec(cells("code")[0], namespace)
    assert (namespace["MODEL"], namespace["TEXT"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", None)


def test_outputs_are_stripped() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)
    identities = [cell["id"] for cell in content["cells"]]
    assert len(set(identities)) == len(identities)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", "\n".join(cells("markdown")))
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).exists()] == []
