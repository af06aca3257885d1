"""A data set of the Hub is read as a stream, and no further than is needed; `datasets` is stood in for."""

from __future__ import annotations

import pytest

from quad_modifiers.data import calibration_windows
from quad_peft.training.data import training_data

datasets = pytest.importorskip("datasets")

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
NAME = "owner/chats"


class Hub:
    """Stands in for `datasets.load_dataset`: endless data sets, and a count of the rows that were read."""

    def __init__(self, columns):
        self.columns, self.read, self.calls = columns, 0, []

    def rows(self):
        index = 0
        while True:
            self.read += 1
            yield {name: make(index) for name, make in self.columns.items()}
            index += 1

    def load_dataset(self, name, config_name=None, *, split=None, streaming=False, **further):
        self.calls.append((name, config_name, split, streaming))
        if not streaming:
            raise ConnectionError("everything would be downloaded")
        stream = datasets.IterableDataset.from_generator(self.rows)
        return stream if split is not None else datasets.IterableDatasetDict(train=stream)


def chat(index):
    return [
        {"role": "user", "content": f"Question {index} about the bridge, measured twice?"},
        {"role": "assistant", "content": f"Answer {index}, in the margin."},
    ]


@pytest.fixture
def hub(monkeypatch):
    def install(**columns):
        made = Hub(columns)
        monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
        return made

    return install


@pytest.fixture
def chat_tokenizer(toy_tokenizer, monkeypatch):
    monkeypatch.setattr(toy_tokenizer, "chat_template", TEMPLATE)
    return toy_tokenizer


def windows(source, tokenizer, **options):
    return calibration_windows(source, tokenizer, num_samples=8, sequence_length=32, **options)


@pytest.mark.parametrize("split", [None, "train_sft"])
def test_conversations_of_the_hub_are_streamed(hub, chat_tokenizer, split):
    made = hub(messages=chat)
    assert len(windows(NAME, chat_tokenizer, splits=split, dataset_config_name="small")) == 8
    assert made.calls == [(NAME, "small", split, True)]
    assert 1000 < made.read < 3000  # the buffer that shuffles, and what the windows need


def test_the_seed_shuffles(hub, chat_tokenizer):
    hub(messages=chat)
    first, again, other = (windows(NAME, chat_tokenizer, seed=seed) for seed in (1, 1, 2))
    assert [row.tolist() for row in first] == [row.tolist() for row in again] != [row.tolist() for row in other]


def test_text_and_token_ids_are_streamed(hub, toy_tokenizer):
    hub(text=lambda index: f"Text {index} of the bridge. " * 5)
    assert len(windows(NAME, toy_tokenizer)) == 8
    hub(input_ids=lambda index: [index % 300] * 40)
    assert {len(row[0]) for row in windows(NAME, None)} == {32}


def test_a_stream_that_was_opened_already(chat_tokenizer):
    made = Hub({"messages": chat})
    assert len(windows(datasets.IterableDataset.from_generator(made.rows), chat_tokenizer)) == 8
    assert made.read < 1000


def test_a_mixture_with_the_hub(hub, chat_tokenizer, tmp_path):
    hub(messages=chat)
    (tmp_path / "text.txt").write_text("Plain text about the bridge. " * 300)
    assert len(windows([f"{NAME}:0.5", f"{tmp_path / 'text.txt'}:0.5"], chat_tokenizer)) == 8


def test_what_cannot_be_streamed_is_loaded_as_before(hub, toy_tokenizer):
    made = hub(text=lambda index: "text")
    with pytest.raises(ValueError, match=r"'owner/chats' is neither a local file nor .*everything would be downloaded"):
        windows(NAME, toy_tokenizer, splits="train[:5%]")
    assert made.calls == [(NAME, None, "train[:5%]", False)]


def test_training_streams_as_many_samples_as_are_asked(hub, chat_tokenizer):
    made = hub(messages=chat)
    data = training_data(NAME, chat_tokenizer, length=32, samples=10)
    assert len(data.samples) == 10
    assert data.source == f"{NAME} (chat)"
    assert made.read < 3000
    stream = datasets.IterableDataset.from_generator(made.rows)
    with pytest.raises(ValueError, match="may have no end: say how many training samples"):
        training_data(stream, chat_tokenizer, length=32)
