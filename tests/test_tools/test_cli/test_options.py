"""Options that several commands have: of loading, of results for programs, and `--set`; the shell's completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import quad_modifiers

SHORT = ("--samples", 6, "--seq-length", 48)
ROOT = Path(quad_modifiers.__file__).parents[1]


class TestCompress:
    def test_set_is_stored_and_json_is_alone_on_stdout(
        self, quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path
    ) -> None:
        pytest.importorskip("llmcompressor")
        model, output = toy_checkpoint("llama", num_hidden_layers=1), tmp_path / "out"
        changes = ("--set", "SVDOutlierProjection.rank=16", "--set", "OutlierSplitGPTQ.method=rtn")
        how = ("--dtype", "bfloat16", "--device", "cpu", "--json")
        done = quad("compress", model, recipe, "-o", output, "--dataset", text, *changes, *how, *SHORT)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert found["format"] == "QUAD, version 1"
        assert found["checkpoint"] == str(output)
        assert found["size_before"]["total"] > found["size_after"]["total"] > found["size_after"]["embedding_and_head"]
        assert "    rank: 16\n" in (output / "recipe.yaml").read_text()
        assert (
            json.loads((output / "config.json").read_text())["quantization_config"]["quad"]["residual_basis"]["rank"]
            == 16
        )
        with safe_open(output / "model.safetensors", "pt") as tensors:
            assert tensors.get_tensor("lm_head.weight").dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--set", "OutlierSplitGPTQ.bitz=3"), "OutlierSplitGPTQ has no field 'bitz'. Did you mean bits?"),
            (("--set", "Outlier.bits=3"), "the recipe has no Outlier"),
            (("--set", "OutlierSplitGPTQ.ignore=[up_prj]"), "'up_prj' matches no module of the model"),
            (("--revision", "v2"), "has no revision 'v2'"),
            (("--device", "cuda:99"), "the device 'cuda:99' cannot be used"),
            (("--dtype", "int3"), "'int3' is not one of"),
            (("--text-column", "body"), "text_column='body' has no effect on the default text"),
        ],
        ids=lambda value: "".join(value) if isinstance(value, tuple) else "",
    )
    def test_bad_options(self, quad, toy_checkpoint, recipe: Path, tmp_path: Path, options, message: str) -> None:
        pytest.importorskip("llmcompressor")
        done = quad("compress", toy_checkpoint("llama"), recipe, "-o", tmp_path / "out", *options)
        assert done.code == 2
        assert message in done.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "inspect", "finetune", "merge", "compare"])
def test_a_folder_has_no_revision(quad, command: str, quad_checkpoint: Path, toy_checkpoint, tmp_path: Path) -> None:
    original = toy_checkpoint("llama")
    arguments = {
        "eval": (quad_checkpoint, "--no-perplexity", "--tasks", "last_word", "--revision", "v2"),
        "inspect": (quad_checkpoint, "-o", tmp_path / "out", "--revision", "v2"),
        "finetune": (quad_checkpoint, "-o", tmp_path / "out", "--revision", "v2"),
        "merge": (quad_checkpoint, tmp_path, "-o", tmp_path / "out", "--revision", "v2"),
        "compare": (quad_checkpoint, original, "--baseline", original, "--baseline-revision", "v2"),
    }[command]
    done = quad(command, *arguments)
    assert done.code == 2
    assert "is a folder, which has no revision 'v2'" in done.err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("finetune", "--distill-from", "ORIGINAL", "--original-revision", "v2", "-o", "OUT"), "has no revision 'v2'"),
        (("finetune", "--device", "meta", "-o", "OUT"), "training runs on cpu or cuda, not on 'meta'"),
        (("inspect", "--baseline-revision", "v2", "-o", "OUT"), "but no baseline; omit it"),
        (("eval", "--baseline-revision", "v2", "--no-perplexity"), "but no baseline; omit it"),
        (("compare", "ORIGINAL", "--dtype", "bfloat16"), "without a baseline no model is loaded"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_options_that_go_with_nothing(
    quad, command: tuple[str, ...], message: str, quad_checkpoint: Path, toy_checkpoint, tmp_path: Path, text: Path
) -> None:
    pytest.importorskip("peft")
    places = {"ORIGINAL": toy_checkpoint("llama"), "OUT": tmp_path / "out"}
    data = ("--data", text, "--seq-length", 16) if command[0] == "finetune" else ()
    done = quad(command[0], quad_checkpoint, *(places.get(each, each) for each in command[1:]), *data)
    assert done.code == 2, done.err
    assert message in done.err
    assert not (tmp_path / "out").exists()


class TestJson:
    def test_recipes(self, quad, recipe: Path) -> None:
        pytest.importorskip("llmcompressor")
        recipe.write_text(recipe.read_text().replace("bits: 4}", "bitz: 4}"))
        done = quad("recipes", "validate", recipe, "quad_w4a4", "--json")
        assert done.code == 2
        bad, good = json.loads(done.out)
        assert (bad["recipe"], bad["sound"], good["sound"], good["problems"]) == (str(recipe), False, True, [])
        assert bad["problems"][0]["line"] == 6
        assert bad["problems"][0]["message"] == "OutlierSplitGPTQ has no field 'bitz'"

    def test_compare(self, quad, quad_checkpoint: Path, toy_checkpoint) -> None:
        done = quad("compare", quad_checkpoint, toy_checkpoint("llama"), "--json")
        assert done.code == 0, done.err
        assert [entry["format"] for entry in json.loads(done.out)["entries"]] == ["QUAD, version 1", "unquantized"]

    def test_eval(self, quad, quad_checkpoint: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
        pytest.importorskip("lm_eval")
        monkeypatch.setenv("QUAD_EVALUATION_CACHE", str(tmp_path / "cache"))
        target = tmp_path / "evaluation.json"
        how = ("--tasks", "", "--perplexity", text, "--window-length", 32, "--limit", 2, "--device", "cpu")
        done = quad("eval", quad_checkpoint, *how, "-o", target, "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out) == json.loads(target.read_text())


def completions(*words: str, position: int | None = None) -> list[str]:
    """Returns what bash would be offered at the end of the words."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "_QUAD_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(("quad", *words)),
        "COMP_CWORD": str(len(words) if position is None else position),
    }
    code = "from quad_modifiers.tools.cli import main; import sys; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_completion() -> None:
    assert set(completions("comp")) == {"compress", "compare"}
    assert "quad_w4a4_square" in completions("compress", "model", "quad_w4a4_s")
    assert "--trust-remote-code" in completions("eval", "--tr")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell(shell: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from quad_modifiers.tools.cli import main

    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    with pytest.raises(SystemExit, match="0"):
        main(["--show-completion", shell])
    assert "_QUAD_COMPLETE" in capsys.readouterr().out
