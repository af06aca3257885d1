import json

import pytest

from quad_modifiers.data import local_texts


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def test_plain_text_is_one_document(tmp_path):
    assert local_texts(write(tmp_path / "a.txt", "one\n\ntwo")) == ["one\n\ntwo"]


def test_json_lines_and_json_list(tmp_path):
    records = [{"text": "one\u2028still one", "id": 1}, {"text": "two", "id": 2}]
    lines = write(
        tmp_path / "a.jsonl", "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    )
    whole = write(tmp_path / "a.json", json.dumps(records, indent=1))
    assert local_texts(lines) == local_texts(str(whole)) == ["one\u2028still one", "two"]


def test_csv_and_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"body": ["one", "two"], "id": [1, 2]})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_csv(tmp_path / "a.csv")
    assert local_texts(tmp_path / "a.parquet", "body") == local_texts(tmp_path / "a.csv", "body") == ["one", "two"]
    with pytest.raises(ValueError, match=r"no column 'text'; the columns are 'body', 'id'"):
        local_texts(tmp_path / "a.parquet")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="not there"):
        local_texts(tmp_path / "nothing.txt")
    with pytest.raises(FileNotFoundError, match="a folder"):
        local_texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', r"line 2: not valid JSON"),
        ("a.jsonl", '{"text": "a"}\n\n{"body": "b"}', r"line 3: there is no column 'text'; the columns are 'body'"),
        ("a.jsonl", '"only a string"', r"line 1: expected an object with a field 'text', found str"),
        ("a.jsonl", '{"text": 3}', r"line 1: the field 'text' must be a string, found int"),
        ("a.json", '[{"text": "a"},\nx]', r"line 2: not valid JSON"),
        ("a.json", '[{"text": "a"}, {}]', r"record 2: there is no column 'text'; the columns are none"),
        ("a.txt", " \n", "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.csv", "text\n1\n2\n", "the column 'text' does not hold text"),
        ("a.csv", "", r"a\.csv cannot be read as csv"),
        ("a.pdf", "x", r"'\.pdf', which is not a text format"),
    ],
)
def test_bad_content_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        local_texts(write(tmp_path / name, content))


def test_bytes_that_are_no_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"not UTF-8 text \(byte 3\)"):
        local_texts(tmp_path / "a.txt")
