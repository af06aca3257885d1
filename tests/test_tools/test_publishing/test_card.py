"""The model card: made from the checkpoint, and respectful of what people wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from quad_modifiers.tools.publishing import plan
from quad_modifiers.tools.publishing.card import read_card, write_card

REPO = "me/toy-quad"


def card(checkpoint: Path, **options) -> str:
    return plan(checkpoint, REPO, check=False, **options).card


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---")[1])


def test_metadata(checkpoint: Path) -> None:
    found = metadata(card(checkpoint, base_model="org/base", license="apache-2.0"))
    assert found["base_model"] == "org/base"
    assert found["base_model_relation"] == "quantized"
    assert found["license"] == "apache-2.0"
    assert found["library_name"] == "quad-modifiers"
    assert found["pipeline_tag"] == "text-generation"
    assert {"quad", "quad-modifiers", "w4a4a8"} <= set(found["tags"])
    assert "model-index" not in found


def test_widths_and_sizes_come_from_the_checkpoint(checkpoint: Path) -> None:
    text = card(checkpoint)
    linears = json.loads((checkpoint / "config.json").read_text())["quantization_config"]["quad"]["linears"]
    q_proj, down_proj = linears["q_proj"], linears["down_proj"]
    clip = q_proj["input"]["clip_ratio"]
    assert f"| q_proj | 4 | output channel | 4 | token | {clip:g} | 8 of {q_proj['in_features']} | no |" in text
    assert f"| down_proj | 4 | output channel | 8 | token | {down_proj['input']['clip_ratio']:g} | 4 of" in text
    header_bytes = int.from_bytes((checkpoint / "model.safetensors").read_bytes()[:8], "little")
    total = (checkpoint / "model.safetensors").stat().st_size - 8 - header_bytes
    assert f"| **all** | **{total / 1e6:.1f}** | |" in text
    for kind in ("packed weights", "scales", "outlier weights", "embedding", "head", "norms"):
        assert f"| {kind}" in text
    assert (checkpoint / "recipe.yaml").read_text().strip() in text
    assert "arXiv:2503.19353" in text
    assert f'from_pretrained("{REPO}")' in text
    assert f"vllm serve {REPO}" in text


def test_a_hand_written_card_is_kept(checkpoint: Path) -> None:
    own = "---\nlicense: mit\ntags:\n- mine\nlanguage: de\n---\n\n# Mein Modell\n\nText von mir.\n"
    (checkpoint / "README.md").write_text(own)
    text = card(checkpoint, base_model="org/base")
    assert text.endswith("---\n\n# Mein Modell\n\nText von mir.\n")
    found = metadata(text)
    assert (found["license"], found["language"], found["base_model"]) == ("mit", "de", "org/base")
    assert found["tags"][0] == "mine"
    assert "quad-modifiers" in found["tags"]


def test_a_hand_written_card_without_metadata(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("# Mine\n")
    text = card(checkpoint)
    assert text.endswith("---\n\n# Mine\n")
    assert metadata(text)["library_name"] == "quad-modifiers"


def test_sections_between_markers_are_updated_and_nothing_else(checkpoint: Path) -> None:
    size = "<!-- quad-modifiers: size -->\nold\n<!-- /quad-modifiers: size -->"
    (checkpoint / "README.md").write_text(f"# Mine\n\nBefore.\n{size}\nAfter.\n")
    text = card(checkpoint)
    assert "old" not in text
    assert "| **all** |" in text
    assert text.index("Before.") < text.index("| **all** |") < text.index("After.")
    assert "## Citation" not in text


def test_our_own_card_is_renewed(checkpoint: Path) -> None:
    write_card(checkpoint, card(checkpoint))
    write_evaluation(checkpoint)
    edited = (checkpoint / "README.md").read_text().replace("# toy-quad", "# toy-quad\n\nA word of mine.")
    (checkpoint / "README.md").write_text(edited)
    text = card(checkpoint, base_model="org/base", license="mit")
    assert "A word of mine." in text
    assert "21.270" in text
    assert metadata(text)["license"] == "mit"
    assert metadata(text)["base_model"] == "org/base"
    assert metadata(text)["model-index"]
    (checkpoint / "evaluation.json").unlink()
    write_card(checkpoint, text)
    assert "model-index" not in metadata(card(checkpoint))


def test_the_card_is_stable(checkpoint: Path) -> None:
    write_card(checkpoint, card(checkpoint))
    first = (checkpoint / "README.md").read_text()
    assert card(checkpoint) == first


@pytest.mark.parametrize(
    "text",
    [
        "<!-- quad-modifiers: size -->\nno end\n",
        "no begin\n<!-- /quad-modifiers: size -->\n",
        "<!-- quad-modifiers: size -->\n<!-- /quad-modifiers: usage -->\n",
        "<!-- quad-modifiers: size -->\n<!-- /quad-modifiers: size -->\n" * 2,
    ],
    ids=["no end", "no begin", "crossed", "twice"],
)
def test_broken_markers(checkpoint: Path, text: str) -> None:
    (checkpoint / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: .*correct the card"):
        card(checkpoint)


def test_broken_metadata(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("---\na: [\n---\n# x\n")
    with pytest.raises(ValueError, match=r"metadata at the head of .*README\.md"):
        card(checkpoint)


def test_a_failed_write_leaves_the_card(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint / "README.md").write_text("# Mine\n")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_card(checkpoint, "new")
    assert (checkpoint / "README.md").read_text() == "# Mine\n"
    assert not list(checkpoint.glob(".README*"))


def test_read_card_without_a_card(tmp_path: Path) -> None:
    assert read_card(tmp_path / "README.md") == ({}, "")


EVALUATION = {
    "format_version": 1,
    "baseline": "org/base",
    "perplexity": [
        {
            "text": "held-out text",
            "window_length": 512,
            "tokens": 20440,
            "value": 21.27,
            "stderr": 1.5,
            "baseline": 18.0,
        }
    ],
    "results": {"piqa": {"alias": "piqa", "acc,none": 0.66, "acc_stderr,none": 0.011, "acc_norm,none": 0.6}},
    "baseline_results": {"piqa": {"alias": "piqa", "acc,none": 0.7}},
    "n_shot": {"piqa": 0},
    "packages": {"lm-eval": "0.4.9"},
    "machine": "2 cores",
}


def write_evaluation(folder: Path, **changes) -> None:
    (folder / "evaluation.json").write_text(json.dumps({**EVALUATION, **changes}))


def test_without_an_evaluation_nothing_is_claimed(checkpoint: Path) -> None:
    text = card(checkpoint)
    assert "No measured results came with this checkpoint." in text
    assert "perplexity" not in text.lower().replace("recipe", "")


def test_with_an_evaluation(checkpoint: Path) -> None:
    write_evaluation(checkpoint)
    text = card(checkpoint)
    assert "| held-out text | 512 | 20440 | 21.270 ± 1.500 | 18.000 | 1.1817 |  |" in text
    assert "| piqa, 0-shot | acc | 0.660 ± 0.011 | 0.700 | 94.3 % |" in text
    assert "| piqa, 0-shot | acc_norm | 0.600 |  |  |" in text
    assert "Measured with lm-eval 0.4.9; 2 cores." in text
    results = metadata(text)["model-index"][0]["results"]
    values = {metric["type"]: metric["value"] for result in results for metric in result["metrics"]}
    assert values == {"perplexity": 21.27, "acc": 0.66, "acc_norm": 0.6}


def test_a_share_of_a_perplexity_is_not_claimed(checkpoint: Path) -> None:
    write_evaluation(
        checkpoint,
        results={"wikitext": {"word_perplexity,none": 22.0}},
        baseline_results={"wikitext": {"word_perplexity,none": 20.0}},
        n_shot={},
    )
    assert "| wikitext | word_perplexity | 22.000 | 20.000 |  |" in card(checkpoint)


def test_compared_tasks_stand_with_their_intervals(checkpoint: Path) -> None:
    scores = {"items": 100, "chance": 0.25, "percent": 80.0, "percent_above_chance": 70.0}
    task = {**scores, "task": "piqa", "metric": "acc_norm", "value": 0.4, "stderr": 0.05, "baseline": 0.5}
    words = {"task": "words", "metric": "word_perplexity", "items": 9, "value": 30.0, "baseline": 25.0}
    write_evaluation(
        checkpoint,
        comparisons=[
            {**task, "baseline_stderr": 0.05, "difference": -0.1, "interval": [-0.2, 0.01]},
            {**words, "difference": 5.0, "interval": [4.0, 6.0]},
        ],
        average={**task, "task": "average", "metric": "accuracy"},
        limit=100,
    )
    text = card(checkpoint)
    assert (
        "| piqa, 0-shot | acc_norm | 100 | 0.25 | 0.400 ± 0.050 | 0.500 ± 0.050 | 80.0 % | 70.0 % | "
        "-0.100 [-0.200, +0.010] | no difference seen |"
    ) in text
    assert "| words | word_perplexity | 9 |  | 30.000 | 25.000 |  |  | +5.000 [+4.000, +6.000] |  |" in text
    assert "| **average** | accuracy | 100 | 0.25 | 0.400 ± 0.050 | 0.500 | 80.0 % | 70.0 % |  |  |" in text
    assert "| piqa, 0-shot | acc |" not in text  # one line a task
    assert "only the first 100 items were asked" in text


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"format_version": 2}, "format_version"),
        ({"perplexities": []}, "perplexities"),
        ({"perplexity": [{"text": "x", "window_length": 512, "tokens": 1, "value": -1}]}, r"perplexity\.0\.value"),
        ({"results": [1]}, "results"),
    ],
)
def test_a_wrong_evaluation_is_refused(checkpoint: Path, changes: dict, where: str) -> None:
    write_evaluation(checkpoint, **changes)
    with pytest.raises(ValueError, match=rf"evaluation\.json: {where}: "):
        card(checkpoint)


def test_an_evaluation_that_is_no_json(checkpoint: Path) -> None:
    (checkpoint / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json: the file: "):
        card(checkpoint)
