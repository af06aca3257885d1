"""Conversations as calibration and training data: the two spellings, the chat template, what is refused."""

from __future__ import annotations

import json
import logging

import pytest
from transformers import PreTrainedTokenizerFast

from quad_modifiers.data import calibration_data, calibration_reading, calibration_windows, local_texts
from quad_modifiers.data.chat import is_conversation, messages_of
from quad_peft.training.data import training_data

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
CHATS = [
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": f"How long is bridge number {index}, measured twice?"},
        {"role": "assistant", "content": f"It is {index * 7} metres long, in the engineer's book."},
    ]
    for index in range(60)
]
SHARED = {"system": "system", "user": "human", "assistant": "gpt"}
SHARE_GPT = [[{"from": SHARED[m["role"]], "value": m["content"]} for m in chat] for chat in CHATS]


@pytest.fixture
def chat_tokenizer(toy_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=toy_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def windows(data, tokenizer, **options):
    return calibration_windows(data, tokenizer, num_samples=8, sequence_length=48, **options)


def ids(rows):
    return [row.flatten().tolist() for row in rows]


@pytest.fixture
def expected(chat_tokenizer):
    return ids(windows([chat_tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS], chat_tokenizer))


def as_jsonl(path, column, chats):
    path.write_text("".join(json.dumps({"id": index, column: chat}) + "\n" for index, chat in enumerate(chats)))
    return path


@pytest.mark.parametrize(("column", "chats"), [("messages", CHATS), ("conversations", SHARE_GPT)])
def test_files_and_tables_of_both_spellings_are_rendered_alike(column, chats, chat_tokenizer, expected, tmp_path):
    datasets = pytest.importorskip("datasets")
    file = as_jsonl(tmp_path / "chats.jsonl", column, chats)
    table = datasets.Dataset.from_dict({column: chats})
    table.to_parquet(tmp_path / "chats.parquet")
    for source in (file, table, datasets.DatasetDict(train=table), chats, tmp_path / "chats.parquet"):
        assert ids(windows(source, chat_tokenizer)) == expected
    assert ids(windows(file, chat_tokenizer, text_column=column)) == expected


def test_a_column_of_another_name_is_named(chat_tokenizer, expected, tmp_path):
    file = as_jsonl(tmp_path / "chats.jsonl", "dialogue", CHATS)
    assert ids(windows(file, chat_tokenizer, text_column="dialogue")) == expected
    with pytest.raises(ValueError, match=r"no column 'text'; the columns are 'id', 'dialogue'"):
        windows(file, chat_tokenizer)


def test_a_column_text_is_read_where_there_is_one(chat_tokenizer):
    datasets = pytest.importorskip("datasets")
    texts = [f"Plain text number {index}, about bridges and engineers. " * 3 for index in range(60)]
    table = datasets.Dataset.from_dict({"messages": CHATS, "text": texts})
    assert ids(windows(table, chat_tokenizer)) == ids(windows(texts, chat_tokenizer))


def test_what_was_used_is_told(chat_tokenizer, tmp_path, caplog):
    file = as_jsonl(tmp_path / "chats.jsonl", "messages", CHATS)
    with caplog.at_level(logging.INFO):
        found = calibration_data(file, calibration_reading(chat_tokenizer), num_samples=8, sequence_length=48)
    (source,) = found.sources
    assert (source.name, source.kind, source.share) == ("chats.jsonl", "chat", 1.0)
    assert (source.texts, source.windows, source.tokens) == (60, 8, 8 * 48)
    assert "chats.jsonl: chat, 8 samples, 384 tokens" in caplog.text


def test_without_a_chat_template_the_remedy_is_told(toy_tokenizer, tmp_path):
    file = as_jsonl(tmp_path / "chats.jsonl", "messages", CHATS)
    for source in (file, CHATS):
        with pytest.raises(ValueError, match=r"tokenizer has no chat template; give the tokenizer of a chat model"):
            windows(source, toy_tokenizer)
        with pytest.raises(ValueError, match="need a tokenizer with a chat template"):
            windows(source, None)


def test_conversations_that_the_template_refuses_are_left_out_and_told(chat_tokenizer, caplog):
    chat_tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + TEMPLATE
    )
    mixed = [chat[1:] if index % 2 else chat for index, chat in enumerate(CHATS)]
    with caplog.at_level(logging.WARNING):
        assert len(windows(mixed, chat_tokenizer)) == 8
    assert "30 conversations were left out" in caplog.text
    assert "begin with the user" in caplog.text
    with pytest.raises(ValueError, match=r"not one of the 60 conversations can be rendered .*begin with the user"):
        windows(CHATS, chat_tokenizer)


def test_messages_are_brought_into_one_form():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert messages_of([{"role": "user", "content": parts, "name": None}]) == [{"role": "user", "content": "one\ntwo"}]
    assert messages_of({"from": ["human", "gpt"], "value": ["a", "b"]}) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    call = [{"id": 1}]
    assert messages_of([{"role": "assistant", "content": None, "tool_calls": call}]) == [
        {"tool_calls": call, "role": "assistant", "content": None}
    ]
    assert not is_conversation([])
    assert not is_conversation(["a"])
    assert not is_conversation([{"text": "a"}])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "wizard", "content": "a"}, "the role 'wizard' is not known"),
        ({"role": "user", "content": 3}, "must be text, not 3"),
        ({"role": "user", "content": [{"type": "image"}]}, "must be text"),
        ({"text": "a"}, r"must have role and content, or from and value, but this one has \['text'\]"),
    ],
)
def test_messages_of_no_known_form_are_refused(message, reason):
    with pytest.raises(ValueError, match=reason):
        messages_of([message])


@pytest.mark.parametrize(
    ("second", "reason"),
    [("a string", "must be a conversation, found str"), ([], "must be a conversation, found an empty list")],
)
def test_a_file_of_both_kinds_is_refused_by_line(second, reason, chat_tokenizer, tmp_path):
    file = as_jsonl(tmp_path / "a.jsonl", "messages", [CHATS[0], second])
    with pytest.raises(ValueError, match=rf"line 2: the field 'messages' {reason}"):
        windows(file, chat_tokenizer)


def test_plain_text_cannot_come_from_conversations(tmp_path):
    with pytest.raises(ValueError, match="holds conversations, which are no plain text"):
        local_texts(as_jsonl(tmp_path / "a.jsonl", "messages", CHATS))


def test_fine_tuning_takes_conversations(chat_tokenizer, tmp_path):
    file = as_jsonl(tmp_path / "chats.jsonl", "conversations", SHARE_GPT)
    rendered = [chat_tokenizer.apply_chat_template(chat, tokenize=False) for chat in CHATS]
    data = training_data(file, chat_tokenizer, length=48)
    assert data.source == "chats.jsonl (chat)"
    assert data.fingerprint == training_data(rendered, chat_tokenizer, length=48).fingerprint
    one_each = training_data(file, chat_tokenizer, length=64, packed=False)
    assert one_each.samples[0].tolist().count(chat_tokenizer.bos_token_id) == 1
