"""`inspect_model`: what it measures of a model and of a checkpoint, and what it writes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import pytest
import torch

from quad_modifiers.checkpoint import whole_model
from quad_modifiers.checkpoint.whole_model import LoadingOptions
from quad_modifiers.tools.inspection import inspect_model
from quad_modifiers.tools.inspection.model_report import _title

pytest.importorskip("llmcompressor")
pytest.importorskip("matplotlib")

SHORT = {"samples": 4, "eval_windows": 2, "seq_length": 48}


def mean_input(found, field: str, groups: tuple[str, ...], stage: str = "after") -> float:
    """The mean of a field of the inputs over all blocks and the given groups."""
    return fmean(getattr(row, field) for row in found.inputs if row.stage == stage and row.group in groups)


class Page(HTMLParser):
    """Addresses, anchors and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data", "action"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def of_a_model(toy_checkpoint, recipe_file: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("report") / "model"
    return inspect_model(
        toy_checkpoint("llama"), folder, recipe=str(recipe_file), dataset=str(text_file), **SHORT
    ), folder


@pytest.fixture(scope="module")
def of_a_checkpoint(toy_checkpoint, make_checkpoint, text_file: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("report") / "checkpoint"
    found = inspect_model(
        make_checkpoint(8), folder, baseline=toy_checkpoint("llama"), dataset=str(text_file), layers=[1], **SHORT
    )
    return found, folder


def test_projection_takes_the_planted_outliers_out(of_a_model) -> None:
    found, _ = of_a_model
    for group in ("qkv", "gate_up"):
        before, after = (mean_input(found, "error_4bit", (group,), stage) for stage in ("before", "after"))
        assert after < 0.5 * before
    assert mean_input(found, "outlier_energy", ("qkv",)) > 0.3
    assert mean_input(found, "step_to_std", ("qkv",)) < mean_input(found, "step_to_std", ("qkv",), "before")
    unquantized = found.loss_of("nothing", "inputs and weights", "")
    assert unquantized.divergence < 1e-5, "the projection keeps the function"
    assert found.loss_of("all", "inputs", "4").divergence < found.loss_of("all", "inputs", "4", "before").divergence


@pytest.mark.usefixtures("undrawn")
def test_the_rotation_of_a_recipe_is_seen(
    toy_checkpoint, recipe_file: Path, text_file: Path, tmp_path: Path, of_a_model
) -> None:
    plain, _ = of_a_model
    recipe = tmp_path / "turned.yaml"
    turned = "\n    FlattenedRotation: {rounds: 4, tokens: 400}\n    DynamicActQuant:"
    recipe.write_text(recipe_file.read_text().replace("\n    DynamicActQuant:", turned))
    found = inspect_model(
        toy_checkpoint("llama"), tmp_path / "report", recipe=str(recipe), dataset=str(text_file), **SHORT
    )
    for stage, same in (("before", True), ("after", False)):
        both = [[row for row in each.inputs if row.stage == stage] for each in (plain, found)]
        assert (both[0] == both[1]) == same
    assert found.loss_of("nothing", "inputs and weights", "").divergence < 1e-5, "it keeps the function"


@pytest.mark.usefixtures("undrawn")
def test_rank_is_taken(toy_checkpoint, recipe_file: Path, text_file: Path, tmp_path: Path) -> None:
    found = inspect_model(
        toy_checkpoint("llama"), tmp_path / "out", recipe=str(recipe_file), rank=4, dataset=str(text_file), **SHORT
    )
    assert found.subject.rank == 4
    surface = next(each for each in found.surfaces if (each.stage, each.group) == ("after", "qkv"))
    assert surface.channels == 68


@pytest.mark.parametrize(("dtype", "is_rounded"), [("auto", False), ("bfloat16", True)])
def test_bfloat16_is_measured_in_float32_where_it_is_emulated(
    dtype: str,
    is_rounded: bool,
    toy_checkpoint,
    recipe_file: Path,
    text_file: Path,
    tmp_path: Path,
    undrawn,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless the dtype is asked for. The projected weights, not quantized, tell: bfloat16 rounds them."""
    monkeypatch.setattr(whole_model, "fast_dtype", lambda device: torch.float32)
    model = toy_checkpoint("llama", dtype=torch.bfloat16)
    options = LoadingOptions(dtype=dtype)
    found = inspect_model(model, tmp_path, recipe=str(recipe_file), dataset=str(text_file), options=options, **SHORT)
    rounded = next(row for row in found.losses if row.stage == "after" and row.part == "nothing")
    assert (abs(rounded.divergence) > 1e-7) == is_rounded


def test_of_a_checkpoint_with_its_original(of_a_checkpoint) -> None:
    found, _ = of_a_checkpoint
    assert found.subject.rank == 8
    assert found.subject.hidden == 64
    assert found.subject.input_bits == {"qkv": 4, "o": 8, "gate_up": 4, "down": 8}
    assert {row.stage for row in found.inputs} == {"before", "after"}
    assert len(found.spectrum.energy) == 64
    assert len(found.blocks) == 2
    assert {surface.layer for surface in found.surfaces} == {1}
    weights, whole = (found.loss_of("all", kind, "as stored") for kind in ("weights", "inputs and weights"))
    assert 0 < weights.divergence < whole.divergence
    u_type, d_type = (found.loss_of(kind, "inputs", "as stored") for kind in ("U-type", "D-type"))
    assert d_type.divergence < 0.2 * u_type.divergence, "8 bits against 4"
    assert found.recommendation.d_type_bits == 8


@pytest.mark.usefixtures("undrawn")
def test_of_a_checkpoint_alone(make_checkpoint, text_file: Path, tmp_path: Path) -> None:
    found = inspect_model(make_checkpoint(8), tmp_path / "out", dataset=str(text_file), **SHORT)
    assert {row.stage for row in found.inputs} == {"after"}
    assert found.blocks == []
    assert found.loss_of("all", "weights", "as stored").divergence == pytest.approx(0, abs=1e-6)
    assert "block-error.png" not in {file.name for file in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("kind", ["of_a_model", "of_a_checkpoint"])
def test_page_needs_nothing_beside_itself(kind: str, request: pytest.FixtureRequest) -> None:
    found, folder = request.getfixturevalue(kind)
    source = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not re.search(r"https?://|//[\w-]+\.\w|@import", re.sub(r"data:image/png;base64,[^\"]*", "", source))
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert {"script", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert len(page.ids) == len(set(page.ids)), "charts share an id"
    for address in page.addresses:
        assert not address.startswith("#") or address[1:] in page.ids
    for reference in re.findall(r"url\(#([^)]*)\)", source):
        assert reference in page.ids
    assert source.rindex('id="recommendation"') > source.rindex("<svg"), "the recommendation ends the page"
    for rule in found.recommendation.rules:
        assert rule.measured in page.text
        assert rule.answer in page.text


@pytest.mark.parametrize("kind", ["of_a_model", "of_a_checkpoint"])
def test_files(kind: str, request: pytest.FixtureRequest) -> None:
    found, folder = request.getfixturevalue(kind)
    source = (folder / "report.html").read_text(encoding="utf-8")
    charts = {file.stem for file in folder.glob("*.png")}
    assert {"spectrum", "input-error", "grid-ratio", "loss-parts", "loss-blocks"} <= charts
    assert ("weight-error" in charts) == ("weight-grid-ratio" in charts) == (kind == "of_a_model")
    assert ("block-error" in charts) == (kind == "of_a_checkpoint")
    for name in charts:
        assert f'<section id="{name}">' in source
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((folder / "inspection.json").read_text())
    assert numbers["format_version"] == 1
    assert numbers["subject"]["rank"] == found.subject.rank
    assert len(numbers["losses"]) == len(found.losses)
    assert numbers["recommendation"]["recipe"] == found.recommendation.recipe
    assert {file.suffix for file in folder.iterdir()} == {".png", ".html", ".json"}


def test_a_name_with_markup_is_text(of_a_model) -> None:
    from dataclasses import replace

    from quad_modifiers.tools.inspection.model_report import inspection_page

    found = of_a_model[0]
    renamed = replace(found, subject=replace(found.subject, name="a/<b>&model", recipe="<i>mine</i>"))
    page = inspection_page(renamed, [])
    assert "&lt;b&gt;&amp;model" in page
    assert "<b>&model" not in page
    assert "<i>mine" not in page


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_left_of_a_failure(
    toy_checkpoint, recipe_file: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr("quad_modifiers.tools.inspection.model_report.inspection_page", broken)
    with pytest.raises(RuntimeError, match="no page"):
        inspect_model(
            toy_checkpoint("llama"), tmp_path / "out", recipe=str(recipe_file), dataset=str(text_file), **SHORT
        )
    assert list(tmp_path.iterdir()) == []


def test_the_title_of_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path / "my-model")
    assert [_title(name) for name in (".", "org/model", str(tmp_path / "my-model"))] == [
        "my-model",
        "model",
        "my-model",
    ]


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"recipe": "rtn_w4a4"}, "the recipe rtn_w4a4 has no SVDOutlierProjection, only DynamicActQuant"),
            ({"rank": 64}, r"rank \(64\) must be smaller than hidden_size \(64\)"),
            ({"layers": [0, 2]}, "has no block 2; choose 0 to 1"),
            ({"eval_windows": 0}, "samples, eval_windows and seq_length must be at least"),
            ({"baseline": "./elsewhere"}, "is an unquantized model, its own baseline; omit --baseline"),
            ({"seq_length": 100_000}, "not enough for one window of 100000"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_arguments(
        self, change, message: str, toy_checkpoint, recipe_file: Path, text_file: Path, tmp_path: Path
    ) -> None:
        given = {"recipe": str(recipe_file), "dataset": str(text_file), **SHORT, **change}
        with pytest.raises(ValueError, match=message):
            inspect_model(toy_checkpoint("llama"), tmp_path / "out", **given)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("option", [{"recipe": "quad_w4a4"}, {"rank": 4}])
    def test_options_of_models_with_a_checkpoint(self, option, make_checkpoint, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="has its projection; omit --recipe and --rank"):
            inspect_model(make_checkpoint(8), tmp_path / "out", **option)

    def test_nothing_is_loaded_before(self, make_checkpoint, toy_checkpoint, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr("quad_modifiers.checkpoint.opened.Opened.load", None)
        for model in (make_checkpoint(8), toy_checkpoint("llama")):
            with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
                inspect_model(model, tmp_path / "out", dataset="./nothing.txt")
            with pytest.raises(ValueError, match="has no block 7"):
                inspect_model(model, tmp_path / "out", layers=[7])
        with pytest.raises(ValueError, match="made of a llama model, but the baseline is a qwen2 model"):
            inspect_model(make_checkpoint(8), tmp_path / "out", baseline=toy_checkpoint("qwen2"))
        with pytest.raises(NotADirectoryError, match="is a file; choose another output"):
            inspect_model(model, toy_checkpoint("llama") / "config.json" / "out")

    def test_no_such_model(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="there is no model folder"):
            inspect_model(tmp_path / "nothing", tmp_path / "out")
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match=r"has no config\.json; it holds no model"):
            inspect_model(tmp_path / "empty", tmp_path / "out")

    def test_unknown_architecture(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        with pytest.raises(ValueError, match="model type 'gpt2' is not supported"):
            inspect_model(tmp_path, tmp_path / "out")

    def test_quantized_by_another_method(self, tmp_path: Path) -> None:
        config = {
            "model_type": "llama",
            "quantization_config": {"quant_method": "compressed-tensors", "format": "dense"},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"is quantized \(compressed-tensors\), but what is inspected must be"):
            inspect_model(tmp_path, tmp_path / "out")

    def test_output_exists(self, toy_checkpoint, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("x")
        with pytest.raises(FileExistsError, match="exists and is not empty"):
            inspect_model(toy_checkpoint("llama"), tmp_path)
        assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]

    def test_baseline_of_another_model(self, make_checkpoint, toy_checkpoint, text_file: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="made of another model"):
            inspect_model(
                make_checkpoint(8),
                tmp_path / "out",
                baseline=toy_checkpoint("llama", seed=7),
                dataset=str(text_file),
                **SHORT,
            )
        assert list(tmp_path.iterdir()) == []
