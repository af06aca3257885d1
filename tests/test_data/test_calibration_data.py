import json
import logging
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from quad_modifiers.data import as_dataloader, calibration_windows
from quad_modifiers.data.calibration import sampled_documents

TEXTS = [
    f"Document {index}: the bridge was measured {index * 7} times by engineer {index}. " * 6 for index in range(40)
]


@pytest.fixture
def windows_of(toy_tokenizer):
    def call(dataset, num_samples=8, sequence_length=32, **options):
        return calibration_windows(
            dataset, toy_tokenizer, num_samples=num_samples, sequence_length=sequence_length, **options
        )

    return call


def layout(windows):
    return [(tuple(window.shape), window.dtype) for window in windows]


def int64_windows(count=8, length=32):
    """The layout that `count` windows of `length` tokens must have."""
    return [((1, length), torch.int64)] * count


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_default_is_named(windows_of, caplog):
    pytest.importorskip("gensim")
    with caplog.at_level(logging.INFO):
        windows = windows_of(None)
    assert layout(windows) == int64_windows()
    assert "Wikipedia articles and modules of Python's standard library" in caplog.text
    assert "held out" in caplog.text


def test_every_text_source_gives_the_same_windows(windows_of, tmp_path):
    datasets = pytest.importorskip("datasets")
    expected = windows_of(TEXTS)
    assert layout(expected) == int64_windows()
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    table = datasets.Dataset.from_dict({"body": TEXTS})
    table.to_parquet(tmp_path / "hub" / "train.parquet")
    for source in (tmp_path / "a.jsonl", str(tmp_path / "a.jsonl"), table, datasets.DatasetDict(train=table)):
        assert same(windows_of(source, text_column="body"), expected)
    assert same(windows_of(str(tmp_path / "hub"), text_column="body"), expected)
    assert same(windows_of(str(tmp_path / "hub"), text_column="body", splits="train[:100%]"), expected)


def test_seed_repeats_and_matters(windows_of):
    assert same(windows_of(TEXTS, seed=3), windows_of(TEXTS, seed=3))
    assert not same(windows_of(TEXTS, seed=3), windows_of(TEXTS, seed=4))


def test_one_window_of_each_stretch_is_drawn(windows_of):
    stream = torch.arange(100 * 32)
    places = [window[0, 0].item() // 32 for window in windows_of(stream, num_samples=10, seed=5)]
    assert [place // 10 for place in sorted(places)] == list(range(10))
    assert places != sorted(places)


def test_large_data_is_sampled_by_document(windows_of, monkeypatch):
    seen = set()

    class Counting(list):
        def __getitem__(self, index):
            seen.add(index)
            return super().__getitem__(index)

        def __iter__(self):
            return map(self.__getitem__, range(len(self)))

    drawn = sampled_documents(Counting(TEXTS), 4 * 8, torch.Generator().manual_seed(0), character_limit=100)
    assert drawn == [TEXTS[index] for index in sorted(seen)]
    assert 4 * 8 < sum(map(len, drawn)) < sum(map(len, TEXTS)) / 2
    seen.clear()
    few = partial(sampled_documents, character_limit=100)
    monkeypatch.setattr("quad_modifiers.data.calibration.sampled_documents", few)
    assert layout(windows_of(Counting(TEXTS), num_samples=4, sequence_length=8)) == int64_windows(4, 8)
    assert 0 < len(seen) < len(TEXTS)


def test_plain_text_file(windows_of, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    assert layout(windows_of(tmp_path / "a.txt")) == int64_windows()


def test_tokenized_dataset_keeps_samples_and_drops_padding(windows_of):
    datasets = pytest.importorskip("datasets")
    rows = [[index + 3] * 10 + [2] * 4 for index in range(6)]
    table = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 10 + [0] * 4] * 6})
    windows = windows_of(table, num_samples=6)
    assert sorted(window[0].tolist() for window in windows) == [row[:10] for row in rows]
    assert layout(windows_of(table, num_samples=3, sequence_length=5)) == int64_windows(3, 5)


def test_token_tensors(windows_of):
    stream = torch.arange(300)
    windows = windows_of(stream, num_samples=9)
    assert sorted(window[0, 0].item() for window in windows) == list(range(0, 288, 32))
    assert layout(windows_of(torch.arange(400).view(10, 40).int())) == int64_windows()
    assert layout(windows_of([torch.arange(32)[None]] * 8)) == int64_windows()
    assert layout(calibration_windows(stream, None, num_samples=8, sequence_length=32)) == int64_windows()


def test_dataloader_is_taken_as_it_comes(windows_of):
    batches = [torch.arange(length)[None] for length in (5, 50, 7)]
    assert same(windows_of(as_dataloader(batches), num_samples=3), batches)
    assert same(windows_of(as_dataloader(batches), num_samples=2), batches[:2])
    padded = [{"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])}]
    windows = windows_of(DataLoader(padded, batch_size=None), num_samples=2)
    assert [window.tolist() for window in windows] == [[[0, 1, 2, 3, 4, 5]], [[8, 9, 10, 11]]]


def test_as_dataloader_yields_what_a_model_takes(make_toy, windows_of):
    loader = as_dataloader(windows_of(TEXTS))
    assert len(loader) == 8
    for batch in loader:
        assert set(batch) == {"input_ids", "attention_mask"}
        assert batch["attention_mask"].all()
        assert make_toy("llama")(**batch).logits.shape == (1, 32, 320)


def test_fewer_windows_are_used_with_a_warning(windows_of, caplog):
    tokens = torch.arange(1024) % 320
    with caplog.at_level(logging.WARNING):
        windows = windows_of(tokens, num_samples=128, sequence_length=256)
    assert layout(windows) == int64_windows(4, 256)
    assert "has 4 windows (1024 tokens) of the 128 x 256 asked" in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.arange(1023), r"has 3 windows \(768 tokens\) of the 128 x 256 asked; at least 4 windows and 1024"),
        (torch.arange(3), "3 tokens, not enough for one window of 256"),
        (torch.zeros(0, dtype=torch.long), "0 tokens"),
        (as_dataloader([]), "empty: not one token"),
        ([], "no text"),
        (["", " "], "no text"),
        (["few words"], "not enough for one window"),
        (torch.zeros(2, 2, 2, dtype=torch.long), r"not \[2, 2, 2\]"),
    ],
)
def test_too_little(windows_of, data, message):
    with pytest.raises(ValueError, match=message):
        windows_of(data, num_samples=128, sequence_length=256)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (7, "a calibration data set cannot be of type int"),
        (b"bytes", "cannot be of type bytes"),
        ({"a": {"text": ["a"]}}, "cannot be of type dict"),
        (torch.zeros(4, 64), "the calibration tensor must hold integer token ids, not torch.float32"),
        ([{"text": "a"}], "text 0 is a dict"),
        (DataLoader([torch.arange(3)], batch_size=None), "yields a Tensor"),
        (DataLoader([{"ids": torch.arange(3)}], batch_size=None), r"a mapping with \['ids'\]"),
    ],
)
def test_wrong_types(windows_of, data, message):
    with pytest.raises(TypeError, match=message):
        windows_of(data)


def test_bad_names_splits_and_columns(windows_of, tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"body": TEXTS})
    with pytest.raises(FileNotFoundError, match="not there"):
        windows_of(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ValueError, match=r"neither a local file nor .* the dataset_config_name or the splits, or"):
        windows_of(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"no column 'text'; the columns are 'body'"):
        windows_of(table)
    with pytest.raises(
        ValueError, match=r"the splits \['a', 'b'\], none of them \['calibration', 'train'\]; .* with splits$"
    ):
        windows_of(datasets.DatasetDict(a=table, b=table), text_column="body")
    with pytest.raises(ValueError, match="must name one calibration split"):
        windows_of(datasets.DatasetDict(a=table, b=table), text_column="body", splits=["a", "b"])
    both = datasets.DatasetDict(a=table, b=table)
    assert layout(windows_of(both, text_column="body", splits={"calibration": "b"})) == int64_windows()


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        calibration_windows(TEXTS, None, num_samples=8, sequence_length=32)


@pytest.mark.parametrize(("samples", "length"), [(0, 32), (8, 1)])
def test_bad_sizes(windows_of, samples, length):
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        windows_of(TEXTS, num_samples=samples, sequence_length=length)
