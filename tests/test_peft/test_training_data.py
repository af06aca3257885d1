"""Samples to train on, from text and token ids."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import DataLoader

from quad_modifiers.data import as_dataloader
from quad_peft.training.data import Collator, training_data
from quad_peft.training.losses import IGNORED

SENTENCES = [f"{i}. Seven wizards mixed a jug of black liquid and measured it twice." for i in range(60)]


def test_windows_are_packed_and_the_last_ones_held_back(toy_tokenizer) -> None:
    data = training_data(SENTENCES, toy_tokenizer, length=32, validation=0.1)
    assert {len(sample) for sample in data.samples} == {32}
    assert data.validation == round(0.1 * len(data.samples))
    stream = torch.cat(data.samples)
    assert toy_tokenizer.decode(stream[:40]).startswith("0. Seven wizards")
    assert len(data.training_samples) + len(data.validation_samples) == len(data.samples)
    last = data.validation_samples[len(data.validation_samples) - 1]
    assert last["place"] == len(data.samples) - 1
    assert torch.equal(last["input_ids"], data.samples[-1])


def test_documents_are_padded_when_asked(toy_tokenizer) -> None:
    texts = ["Short.", "A text of some length, for a toy.", " ", "x" * 500]
    data = training_data(texts, toy_tokenizer, length=32, packed=False, validation=0.3)
    assert [len(sample) for sample in data.samples][-1] == 32
    assert len(data.samples) == 3
    batch = Collator(pad_token=2)([{"input_ids": sample, "place": i} for i, sample in enumerate(data.samples)])
    keep = batch["attention_mask"].bool()
    assert keep.sum().item() == sum(len(sample) for sample in data.samples)
    assert (batch["input_ids"][~keep] == 2).all()
    assert (batch["labels"][~keep] == IGNORED).all()
    assert torch.equal(batch["labels"][keep], batch["input_ids"][keep])
    assert batch["place"].tolist() == [0, 1, 2]


def test_equal_lengths_need_no_mask() -> None:
    batch = Collator()([{"input_ids": torch.arange(4), "place": 0}, {"input_ids": torch.arange(4), "place": 1}])
    assert "attention_mask" not in batch


def test_a_draw_leaves_the_validation_samples_alone() -> None:
    ids = torch.arange(3, 303).view(30, 10)
    data = training_data(ids, None, length=10, samples=10, validation=0.2, seed=1)
    assert len(data.samples) == 10
    assert data.validation == 2
    assert torch.equal(torch.stack(data.samples[-2:]), ids[-2:])
    firsts = [int(sample[0]) for sample in data.samples[:-2]]
    assert firsts == sorted(set(firsts))
    again = training_data(ids, None, length=10, samples=10, validation=0.2, seed=1)
    assert again.fingerprint == data.fingerprint
    assert training_data(ids, None, length=10, samples=10, validation=0.2, seed=2).fingerprint != data.fingerprint


def test_default_is_the_calibration_half(toy_tokenizer) -> None:
    pytest.importorskip("gensim")
    from quad_modifiers.data import wikipedia_articles

    data = training_data(None, toy_tokenizer, length=512, samples=4, validation=0.25)
    held_out = "\n\n".join(wikipedia_articles("held_out"))
    for sample in data.samples:
        assert toy_tokenizer.decode(sample[:100]).strip() not in held_out
    assert "halves that calibrate" in data.source


def test_files_and_columns(toy_tokenizer, tmp_path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in SENTENCES))
    data = training_data(file, toy_tokenizer, length=32, text_column="body")
    assert data.source == "text.jsonl"
    assert torch.equal(data.samples[0], training_data(SENTENCES, toy_tokenizer, length=32).samples[0])
    with pytest.raises(ValueError, match=r"text.jsonl, line 1: there is no column 'text'; the columns are 'body'"):
        training_data(file, toy_tokenizer, length=32)


ROWS = [[index + 3] * 10 for index in range(20)]


def tokenized(rows: list[list[int]]):
    """A table as trainers save it: padded on the right."""
    datasets = pytest.importorskip("datasets")
    padded = [row + [2] * 4 for row in rows]
    return datasets.Dataset.from_dict({"input_ids": padded, "attention_mask": [[1] * 10 + [0] * 4] * len(rows)})


def test_tokenized_datasets_keep_their_samples_and_lose_their_padding() -> None:
    data = training_data(tokenized(ROWS), None, length=12, validation=0.1)
    assert [sample.tolist() for sample in data.samples] == ROWS
    assert data.validation == 2
    assert {len(sample) for sample in training_data(tokenized(ROWS), None, length=6).samples} == {6}


def test_a_split_of_a_datasetdict_is_named_or_the_usual_one() -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"calibration": ROWS[:5], "train": ROWS[5:9], "other": ROWS[9:]}
    tables = datasets.DatasetDict({name: tokenized(rows) for name, rows in splits.items()})
    for split, wanted in ((None, "train"), ("other", "other"), ("calibration", "calibration")):
        data = training_data(tables, None, length=12, split=split)
        assert [sample.tolist() for sample in data.samples] == splits[wanted], split
    only = datasets.DatasetDict(test=tables["other"])
    assert len(training_data(only, None, length=12).samples) == 11
    with pytest.raises(ValueError, match=r"none of them \['test'\]; name one with split$"):
        training_data(tables, None, length=12, split="test")


def test_text_columns_of_datasets(toy_tokenizer, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"body": SENTENCES})
    table.to_parquet(tmp_path / "folder" / "train.parquet")
    wanted = training_data(SENTENCES, toy_tokenizer, length=32).fingerprint
    for source in (table, datasets.DatasetDict(train=table), str(tmp_path / "folder")):
        assert training_data(source, toy_tokenizer, length=32, text_column="body").fingerprint == wanted
    with pytest.raises(ValueError, match=r"no column 'text'; the columns are 'body'"):
        training_data(table, toy_tokenizer, length=32)


def test_a_stream_of_token_ids_is_cut_into_windows() -> None:
    data = training_data(torch.arange(100), None, length=30)
    assert torch.equal(torch.cat(data.samples), torch.arange(90))
    assert len(data.samples) == 3


def test_of_a_dataloader_the_first_samples_are_taken() -> None:
    batches = [torch.tensor([row]) for row in ROWS]
    data = training_data(as_dataloader(batches), None, length=8, samples=6)
    assert [sample.tolist() for sample in data.samples] == [row[:8] for row in ROWS[:6]]
    assert len(training_data(as_dataloader(batches), None, length=8).samples) == 20


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (["too short"], {}, "gives 0 samples of up to 32 tokens"),
        (["", " "], {"packed": False}, "gives 0 samples"),
        (SENTENCES, {"validation": 1.0}, r"validation \(1.0\) is a share"),
        (SENTENCES, {"length": 1}, r"length \(1\) must be at least 2"),
        (SENTENCES, {"samples": 1}, r"samples \(1\) must be at least 2"),
        ("nowhere.txt", {}, "nowhere.txt"),
    ],
)
def test_bad_input(source, options, message, toy_tokenizer) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        training_data(source, toy_tokenizer, **{"length": 32, **options})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "a training data set cannot be of type int"),
        (b"bytes", "a training data set cannot be of type bytes"),
        (torch.zeros(4, 8), "the training tensor must hold integer token ids, not torch.float32"),
        ([torch.zeros(8)], "a training sample must hold integer token ids, not torch.float32"),
        ([{"text": "a"}], "every text must be a str, but text 0 is a dict"),
        ([[3, 4, 5]], "text 0 is a list; give strings, or tensors of token ids"),
        (DataLoader([torch.arange(3)], batch_size=None), "the DataLoader must yield dicts with 'input_ids'"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_other_types_are_refused(source, message, packed, toy_tokenizer) -> None:
    with pytest.raises(TypeError, match=message):
        training_data(source, toy_tokenizer, length=32, packed=packed)


def test_names_that_cannot_be_loaded_are_told_with_the_options_of_training(toy_tokenizer, tmp_path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"correct the name, the dataset_config or the split, or give a local"):
        training_data(str(tmp_path / "nothing"), toy_tokenizer, length=32)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        training_data(SENTENCES, None, length=32)
