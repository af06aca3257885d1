"""Reads documents from local files: plain text, JSON lines, CSV and Parquet."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCAL_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")


def local_texts(path: str | Path, text_column: str = "text") -> list[str]:
    """Returns the documents of a local file.

    Args:
        path: a .txt or .md file (one document), .jsonl or .json (one object per line; .json may also hold one list of
            objects), .csv or .parquet (read by the `datasets` package).
        text_column: the field that holds the text; unused for plain text.

    Raises:
        FileNotFoundError: if there is no file of that name.
        ImportError: for a .csv or .parquet file without the `datasets` package.
        ValueError: for an unknown suffix, a bad line (named by its number), no such column (the columns are named), or
            no text at all.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "not there"
        raise FileNotFoundError(f"the text file {path} is {what}; give one of {', '.join(LOCAL_SUFFIXES)}")
    suffix = path.suffix.lower()
    if suffix in (".txt", ".md"):
        texts = [_read(path)]
    elif suffix in (".jsonl", ".json"):
        texts = list(_json_texts(path, text_column))
    elif suffix in (".csv", ".parquet"):
        texts = _table_texts(path, suffix.removeprefix("."), text_column)
    else:
        raise ValueError(f"{path} ends in {suffix!r}, which is not a text format; use {', '.join(LOCAL_SUFFIXES)}")
    if not any(text.strip() for text in texts):
        raise ValueError(f"{path} holds no text ({len(texts)} documents, all empty); give a file with text in it")
    return texts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def _json_texts(path: Path, text_column: str) -> Iterator[str]:
    """Yields the text of each record of a JSON-lines file, or of a .json file that holds one list."""
    content = _read(path)
    if path.suffix.lower() == ".json" and content.lstrip().startswith("["):
        try:
            records = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); correct the line") from error
        for number, record in enumerate(records, start=1):
            yield _field(record, text_column, f"{path}, record {number}")
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not valid JSON ({error.msg}); each line must be one JSON object"
            ) from error
        yield _field(record, text_column, f"{path}, line {number}")


def _field(record: Any, text_column: str, where: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with a field {text_column!r}, found {type(record).__name__}")
    check_column(text_column, list(record), where)
    text = record[text_column]
    if not isinstance(text, str):
        raise ValueError(f"{where}: the field {text_column!r} must be a string, found {type(text).__name__}")
    return text


def _table_texts(path: Path, loader: str, text_column: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs the package datasets; install it with `pip install quad-modifiers[compress]`, or "
            "convert the file to .jsonl"
        ) from error
    try:
        table = load_dataset(loader, data_files=glob.escape(str(path)), split="train")
    except Exception as error:  # pandas and pyarrow have many ways to fail; `datasets` wraps them in its own
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"{path} cannot be read as {loader} ({reason}); correct the file") from error
    check_column(text_column, table.column_names, str(path))
    texts = [text for text in table[text_column] if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path}: the column {text_column!r} does not hold text; name the right one with text_column")
    return texts


def check_column(text_column: str, present: list[str], where: str) -> None:
    """Raises a ValueError that names the columns `present` if `text_column` is not among them."""
    if text_column not in present:
        raise ValueError(
            f"{where}: there is no column {text_column!r}; the columns are {', '.join(map(repr, present)) or 'none'}. "
            "Name the right one with text_column"
        )
