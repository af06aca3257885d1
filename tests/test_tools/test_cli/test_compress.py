"""`quad compress` and `quad export`."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import quad_modifiers
from quad_modifiers.tools.cli import compress as compressing

pytest.importorskip("llmcompressor")

SHORT = ("--samples", 6, "--seq-length", 48)


def test_equals_the_python_function(quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path) -> None:
    model = toy_checkpoint("llama")
    done = quad("compress", model, recipe, "-o", tmp_path / "cli", "--dataset", text, "--seed", 3, *SHORT)
    assert done.code == 0, done.err
    quad_modifiers.oneshot(
        model,
        recipe,
        dataset=str(text),
        output_dir=tmp_path / "python",
        num_calibration_samples=6,
        max_seq_length=48,
        seed=3,
    )
    for name in ("model.safetensors", "config.json", "recipe.yaml", "tokenizer.json"):
        assert (tmp_path / "cli" / name).read_bytes() == (tmp_path / "python" / name).read_bytes(), name


def test_conversations_and_text_with_weights(quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(toy_checkpoint("llama"), tmp_path / "model"))
    chats = tmp_path / "chats.jsonl"
    line = {"messages": [{"role": "user", "content": "How long is the bridge, measured twice?"}]}
    chats.write_text(f"{json.dumps(line)}\n" * 80)
    arguments = ("compress", model, recipe, "-o", tmp_path / "out", *SHORT)
    sources = ("--dataset", f"{chats}:0.5", "--dataset", f"{text}:0.5")
    done = quad(*arguments, *sources)
    assert done.code == 2
    assert "the tokenizer has no chat template" in done.err
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    done = quad(*arguments, *sources)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert [(each["kind"], each["share"], each["windows"]) for each in record["sources"]] == [
        ("chat", 0.5, 3),
        ("text", 0.5, 3),
    ]
    assert (record["window_length"], record["seed"]) == (48, 0)


def test_closing_table(quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path) -> None:
    model, output = toy_checkpoint("llama"), tmp_path / "out"
    done = quad("compress", model, recipe, "-o", output, "--dataset", text, *SHORT)
    assert done.code == 0, done.err
    rows = {}
    for line in done.out.splitlines():
        name, _, value = line.strip().partition("  ")
        rows[name] = value.strip()
    assert rows["recipe"] == str(recipe)
    assert rows["format"] == "QUAD, version 1"
    assert rows["checkpoint"] == str(output)
    for name, folder in (("size before", model), ("size after", output)):
        tensors = load_file(folder / "model.safetensors")
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert rows[name].startswith(f"{total / 1e3:.1f} kB, of which embedding and head "), name
    assert float(rows["decoder layers"].partition(" ")[0]) > 1
    assert rows["time"].endswith(" s")
    assert float(rows["peak memory"].partition(" GiB")[0]) > 0
    assert "quantized linears" not in done.err, "oneshot's own table is shown as well"
    assert "SVDOutlierProjection" in done.err


def test_size_of_a_model_from_the_cache(toy_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--org--toy" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(toy_checkpoint("llama"))
    (tmp_path / "models--org--toy" / "refs").mkdir()
    (tmp_path / "models--org--toy" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = compressing.original_folder("org/toy")
    assert found is not None
    assert found.samefile(snapshot)
    assert compressing.original_folder("org/other") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "./nothing"}, "there is no model folder ./nothing"),
        ({"-o": "{text}/out"}, "text.txt is a file; choose another output"),
        ({"recipe": "quad_w4"}, "recipe 'quad_w4' is neither a file nor the name of a recipe"),
        ({"--dataset": "./nothing.txt"}, "nothing.txt"),
        ({"--seed": "-1"}, "--seed"),
    ],
    ids=["model", "output", "recipe", "dataset", "seed"],
)
def test_bad_input(
    quad,
    toy_checkpoint,
    recipe: Path,
    text: Path,
    tmp_path: Path,
    change: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)  # no weights are loaded before
    given = {"model": toy_checkpoint("llama"), "recipe": recipe, "-o": tmp_path / "out", **change}
    more = [
        item for name, value in given.items() if name.startswith("-") for item in (name, str(value).format(text=text))
    ]
    done = quad("compress", given["model"], given["recipe"], *more, *SHORT)
    assert done.code == 2
    assert message in done.err.splitlines()[-1]
    assert done.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_one_line(toy_checkpoint, text: Path) -> None:
    model = quad_modifiers.oneshot(
        str(toy_checkpoint("llama")),
        "test_stage: {quad_modifiers: {SVDOutlierProjection: {rank: 8}, OutlierSplitGPTQ: {bits: 4}}}",
        dataset=str(text),
        num_calibration_samples=6,
        max_seq_length=48,
    )
    assert model.model.layers[0].mlp.up_proj.packed().grid.bits == 4


def test_weights_that_are_stored_twice_do_not_matter(
    quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(toy_checkpoint("llama"), model)
    shutil.copyfile(model / "model.safetensors", model / "consolidated.safetensors")  # as Mistral's folders have it
    done = quad("compress", model, recipe, "-o", tmp_path / "out", "--dataset", text, *SHORT)
    assert done.code == 0, done.err
    assert "size after" in done.out
    assert "size before" not in done.out


def test_windows_beyond_the_positions_are_mentioned(
    quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(toy_checkpoint("llama"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 40}))
    done = quad("compress", model, recipe, "-o", tmp_path / "out", "--dataset", text, *SHORT)
    assert done.code == 0, done.err
    assert "windows of 48 tokens are longer than the 40 positions" in done.err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [("config.json", "{", "config.json is damaged"), ("model.safetensors", None, "has a config.json but no weights")],
)
def test_damaged_folders(
    quad, toy_checkpoint, recipe: Path, tmp_path: Path, file: str, content: str | None, message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(toy_checkpoint("llama"), model)
    (model / file).unlink()
    if content is not None:
        (model / file).write_text(content)
    for command in (("compress", model, recipe), ("inspect", model), ("eval", model), ("finetune", model)):
        output = ("--no-perplexity",) if command[0] == "eval" else ("-o", tmp_path / "out")
        done = quad(*command, *output)
        assert done.code == 2, command
        assert message in done.err, command


def test_an_output_that_exists_is_left_alone(quad, toy_checkpoint, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    done = quad("compress", toy_checkpoint("llama"), recipe, "-o", tmp_path / "out", *SHORT)
    assert done.code == 2
    assert "exists and is not empty" in done.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_control_c_leaves_nothing(
    start_quad: Callable, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path
) -> None:
    process: subprocess.Popen[str] = start_quad(
        "compress",
        toy_checkpoint("llama"),
        recipe,
        "-o",
        tmp_path / "out",
        "--dataset",
        text,
        "--samples",
        400,
        "--seq-length",
        32,
    )
    while "SVDOutlierProjection: second moments" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted"
    assert out == ""
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"toy.yaml", "text.txt"}


class TestExport:
    RECIPE = """
quad_stage:
  quad_modifiers:
    SVDOutlierProjection: {rank: 16, basis: square, online_rotation: [], o_proj_rank_per_head: 8, down_proj_rank: 16}
    DynamicActQuant: {strategy: group, group_size: 8, u_type_clip_ratio: 1.0, d_type_clip_ratio: 1.0}
    OutlierSplitGPTQ: {bits: 4, group_size: 8}
"""

    def test_portable(self, quad, toy_checkpoint, text: Path, tmp_path: Path) -> None:
        (tmp_path / "portable.yaml").write_text(self.RECIPE)
        source, target = tmp_path / "quad", tmp_path / "stock"
        quad("compress", toy_checkpoint("llama"), tmp_path / "portable.yaml", "-o", source, "--dataset", text, *SHORT)
        done = quad("export", source, "--format", "compressed-tensors", "-o", target, "--group-size", 8)
        assert done.code == 0, done.err
        assert (target / "model.safetensors").is_file()
        assert "compressed-tensors, pack-quantized" in done.out
        assert "QUAD, version 1" in done.out

    def test_what_cannot_be_expressed(self, quad, quad_checkpoint: Path, tmp_path: Path) -> None:
        done = quad("export", quad_checkpoint, "-o", tmp_path / "stock")
        assert done.code == 2
        assert "cannot be written as compressed-tensors" in done.err
        assert not (tmp_path / "stock").exists()

    def test_dense(self, quad, quad_checkpoint: Path, tmp_path: Path) -> None:
        done = quad("export", quad_checkpoint, "-o", tmp_path / "plain", "--format", "dense", "--dtype", "bfloat16")
        assert done.code == 0, done.err
        assert "inputs are not quantized any more" in done.err
        assert "unquantized" in done.out
        assert {str(t.dtype) for t in load_file(tmp_path / "plain" / "model.safetensors").values()} == {
            "torch.bfloat16"
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--format", "dense", "--group-size", 8), "belong to --format compressed-tensors; leave them out"),
            (("--format", "dense", "--online-hadamard"), "belong to --format compressed-tensors; leave them out"),
            (("--dtype", "float32"), "--dtype belongs to --format dense"),
        ],
    )
    def test_options_of_the_other_format(self, quad, tmp_path: Path, options, message) -> None:
        done = quad("export", tmp_path / "never read", "-o", tmp_path / "plain", *options)
        assert done.code == 2
        assert message in done.err

    def test_online_hadamard(self, quad, toy_checkpoint, text: Path, tmp_path: Path) -> None:
        online = self.RECIPE.replace("rank: 16", "rank: 0").replace("online_rotation: [], ", "")
        online = online.replace("o_proj_rank_per_head: 8", "o_proj_rank_per_head: 0")
        (tmp_path / "online.yaml").write_text(online)
        source, target = tmp_path / "quad", tmp_path / "stock"
        quad("compress", toy_checkpoint("llama"), tmp_path / "online.yaml", "-o", source, "--dataset", text, *SHORT)
        refused = quad("export", source, "-o", target)
        assert refused.code == 2
        assert "--online-hadamard" in refused.err
        done = quad("export", source, "-o", target, "--online-hadamard")
        assert done.code == 0, done.err
        assert "transformers ignores it" in done.err
        assert "transform_config" in json.loads((target / "config.json").read_text())["quantization_config"]


def test_original_and_result_are_compared(quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("compress", toy_checkpoint("llama"), recipe, "--dataset", text, *SHORT)
    done = quad(*arguments, "-o", tmp_path / "table")
    assert done.code == 0, done.err
    assert re.search(
        r"perplexity +[\d.]+ before, [\d.]+ after: [\d.]+ times \(4 windows of the calibration text", done.out
    )
    assert "it goes on, before" in done.out
    assert "it goes on, after" in done.out
    done = quad(*arguments, "-o", tmp_path / "json", "--json")
    seen = json.loads(done.out)["sanity"]
    assert seen["ratio"] == pytest.approx(seen["after"]["perplexity"] / seen["before"]["perplexity"])
    assert 0.5 < seen["ratio"] < 2
    assert seen["before"]["continuation"]
    assert seen["prompt"]


def test_the_comparison_can_be_left_out(quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("compress", toy_checkpoint("llama"), recipe, "--dataset", text, "-o", tmp_path / "out", *SHORT)
    done = quad(*arguments, "--no-check", "--max-perplexity-ratio", 2)
    assert done.code == 2
    assert "give one of them" in done.err
    assert not (tmp_path / "out").exists()
    done = quad(*arguments, "--no-check", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["sanity"] is None


def test_a_result_that_is_worse_than_allowed(
    quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quad_modifiers.tools.evaluation.sanity.BROKEN", 0.1)
    arguments = ("compress", toy_checkpoint("llama"), recipe, "--dataset", text, *SHORT)
    done = quad(*arguments, "-o", tmp_path / "out", "--max-perplexity-ratio", 0.5)
    assert done.code == 1
    assert re.search(r"the perplexity is [\d.]+ times the original's: the checkpoint is written, but", done.err)
    assert (tmp_path / "out" / "config.json").is_file()
    assert "checkpoint" in done.out
    monkeypatch.undo()
    assert quad(*arguments, "-o", tmp_path / "good", "--max-perplexity-ratio", 3).code == 0


def test_a_comparison_that_fails_loses_nothing(
    quad, toy_checkpoint, recipe: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr("quad_modifiers.tools.evaluation.sanity.load_reference", fail)
    arguments = ("compress", toy_checkpoint("llama"), recipe, "--dataset", text, *SHORT)
    done = quad(*arguments, "-o", tmp_path / "out")
    assert done.code == 0
    assert "the checkpoint is written, but could not be looked at: the disk is gone" in done.err
    assert (tmp_path / "out" / "config.json").is_file()
    assert quad(*arguments, "-o", tmp_path / "strict", "--max-perplexity-ratio", 3).code == 1


def test_a_dry_run_only_says_what_it_would_do(quad, toy_checkpoint, recipe: Path, tmp_path: Path) -> None:
    arguments = ("compress", toy_checkpoint("llama"), recipe, "-o", tmp_path / "new" / "out", "--dry-run", *SHORT)
    done = quad(*arguments)
    assert done.code == 0, done.err
    for words in ("down_proj", "4 bits, per token", "at most", "288 tokens"):
        assert words in done.out
    assert not (tmp_path / "new").exists()
    done = quad(*arguments, "--json")
    assert {each["role"] for each in json.loads(done.out)["linears"]} >= {"q_proj", "down_proj"}
