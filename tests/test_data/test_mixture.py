"""Several sources with weights."""

from __future__ import annotations

import pytest
import torch

from quad_modifiers.data import calibration_data, calibration_reading, calibration_windows, named_sources
from quad_modifiers.data.mixture import Weighted, mixture_of, shares_of
from quad_peft.training.data import training_data

LOW, HIGH = torch.arange(0, 100).repeat(20), torch.arange(200, 300).repeat(20)


@pytest.fixture
def files(tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("Seven wizards mixed a jug of liquid. " * 200)
    second.write_text("0123456789 0123456789 0123456789. " * 200)
    return str(first), str(second)


def test_every_source_gives_its_share() -> None:
    found = calibration_data([(LOW, 7), (HIGH, 3)], calibration_reading(None), num_samples=20, sequence_length=50)
    from_low = [bool((window < 100).all()) for window in found.windows]
    assert (sum(from_low), len(from_low)) == (14, 20)
    assert from_low != sorted(from_low, reverse=True)  # mixed, not one after the other
    assert [(each.share, each.windows, each.tokens) for each in found.sources] == [(0.7, 14, 700), (0.3, 6, 300)]


def test_names_with_weights_in_python_and_on_the_command_line(files, toy_tokenizer) -> None:
    first, second = files

    def windows(dataset):
        return calibration_windows(dataset, toy_tokenizer, num_samples=10, sequence_length=32, seed=1)

    written = windows([f"{first}:0.7", f"{second}:0.3"])
    for same in (
        [(first, 0.7), (second, 0.3)],
        named_sources([f"{first}:7", f"{second}:3"]),
        [(first, 70), (second, 30)],
    ):
        assert all(torch.equal(a, b) for a, b in zip(written, windows(same), strict=True))
    digits = [window for window in written if "012" in toy_tokenizer.decode(window[0])]
    assert len(digits) == 3


def test_names_alone_weigh_the_same(files) -> None:
    assert [each.share for each in mixture_of(list(files))] == [0.5, 0.5]
    assert [each.share for each in mixture_of(["owner/one", "owner/two"])] == [0.5, 0.5]
    assert named_sources([]) is None
    assert named_sources([files[0]]) == files[0]
    assert named_sources([f"{files[0]}:2"]) == files[0]


@pytest.mark.parametrize("texts", [["a text: 0.5", "another: 1"], ["short", "words"], ["One sentence."], ["", " "]])
def test_lists_of_texts_stay_texts(texts) -> None:
    assert mixture_of(texts) == [Weighted(texts, 1.0)]


def test_a_file_whose_name_looks_like_a_weight_is_a_file(tmp_path) -> None:
    file = tmp_path / "data:3"
    file.write_text("text")
    assert mixture_of(str(file)) == [Weighted(str(file), 1.0)]


def test_shares_add_up() -> None:
    parts = [Weighted(None, share) for share in (0.98, 0.01, 0.01)]
    assert shares_of(parts, 10) == [8, 1, 1]
    assert shares_of([Weighted(None, 1 / 3)] * 3, 10) in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    with pytest.raises(ValueError, match="2 samples cannot come from 3 sources"):
        shares_of(parts, 2)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a.txt:0.5", "b.txt"], "b.txt has no weight, but another source has one"),
        (["a.txt:0", "b.txt:1"], "the weight of a.txt must be above 0, not 0"),
    ],
)
def test_bad_weights(names, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        named_sources(names)


def test_a_source_that_is_too_short_is_told(caplog) -> None:
    found = calibration_windows([(LOW, 0.5), (HIGH[:300], 0.5)], None, num_samples=30, sequence_length=50)
    assert len(found) == 21
    assert "a Tensor has 6 windows of the 15 that are its share" in caplog.text


def test_training_takes_every_share_to_train_and_to_validate_on() -> None:
    data = training_data([(LOW, 0.75), (HIGH, 0.25)], None, length=50, samples=20, validation=0.2)
    training = [data.samples[index] for index in range(len(data.samples) - data.validation)]
    assert (len(data.samples), data.validation) == (20, 4)
    assert sum(bool((sample < 100).all()) for sample in training) == 12
    assert sum(bool((sample < 100).all()) for sample in data.samples[-4:]) == 3
    assert data.source == "a Tensor (token ids, 75 %); a Tensor (token ids, 25 %)"
    longest = training_data([(LOW, 0.5), (HIGH[:500], 0.5)], None, length=50)
    assert len(longest.samples) == 20
    with pytest.raises(ValueError, match=r"samples \(3\) must be at least 2 for each of the 2 sources"):
        training_data([(LOW, 0.5), (HIGH, 0.5)], None, length=50, samples=3)
