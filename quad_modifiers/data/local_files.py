"""Reads documents from local files: plain text, JSON lines, CSV and Parquet."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quad_modifiers.data.chat import CHAT_COLUMNS, is_conversation

DEFAULT_COLUMN = "text"
LOCAL_SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet")


def local_texts(path: str | Path, text_column: str = DEFAULT_COLUMN) -> list[str]:
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
    values = local_values(path, text_column)
    if not isinstance(values[0], str):
        raise ValueError(f"{path} holds conversations, which are no plain text; name a column of text with text_column")
    return values


def local_values(path: str | Path, text_column: str = DEFAULT_COLUMN) -> list[Any]:
    """Returns the documents of a local file, all of them texts or all conversations.

    Conversations are in the column `text_column`, or, where there is no column "text", in one that is usual for them.
    The errors are those of `local_texts`.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "not there"
        raise FileNotFoundError(f"the text file {path} is {what}; give one of {', '.join(LOCAL_SUFFIXES)}")
    suffix = path.suffix.lower()
    if suffix in (".txt", ".md"):
        values: list[Any] = [_read(path)]
    elif suffix in (".jsonl", ".json"):
        values = list(_json_values(path, text_column))
    elif suffix in (".csv", ".parquet"):
        values = _table_values(path, suffix.removeprefix("."), text_column)
    else:
        raise ValueError(f"{path} ends in {suffix!r}, which is not a text format; use {', '.join(LOCAL_SUFFIXES)}")
    if not any(value.strip() if isinstance(value, str) else value for value in values):
        raise ValueError(f"{path} holds no text ({len(values)} documents, all empty); give a file with text in it")
    return values


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def _json_values(path: Path, text_column: str) -> Iterator[Any]:
    """Yields text or conversation of each record of a JSON file; the first record says which of the two all have."""
    column, first = None, None
    for where, record in _json_records(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object with a field {text_column!r}, found {type(record).__name__}")
        column = column or choose_column(text_column, list(record), where)
        check_column(column, list(record), where)
        value = record[column]
        first = value if first is None else first
        if not any(is_kind(value) and is_kind(first) for is_kind in (_is_text, is_conversation)):
            what = "a conversation" if is_conversation(first) else "a string"
            found = "an empty list" if value == [] else type(value).__name__
            raise ValueError(f"{where}: the field {column!r} must be {what}, found {found}")
        yield value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields place and content of each record of a JSON-lines file, or of a .json file that holds one list."""
    content = _read(path)
    if path.suffix.lower() == ".json" and content.lstrip().startswith("["):
        try:
            records = json.loads(content)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); correct the line") from error
        for number, record in enumerate(records, start=1):
            yield f"{path}, record {number}", record
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
        yield f"{path}, line {number}", record


def _table_values(path: Path, loader: str, text_column: str) -> list[Any]:
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
    column = choose_column(text_column, table.column_names, str(path))
    values = [value for value in table[column] if value is not None]
    if not all(isinstance(value, str) for value in values) and not all(map(is_conversation, values)):
        raise ValueError(f"{path}: the column {column!r} does not hold text; name the right one with text_column")
    return values


def choose_column(text_column: str, present: list[str], where: str) -> str:
    """Returns the column to read: `text_column`, or one for conversations where there is no column "text".

    Raises:
        ValueError: naming the columns `present`, if neither is among them.
    """
    if text_column not in present and text_column == DEFAULT_COLUMN:
        for name in CHAT_COLUMNS:
            if name in present:
                return name
    check_column(text_column, present, where)
    return text_column


def check_column(text_column: str, present: list[str], where: str) -> None:
    """Raises a ValueError that names the columns `present` if `text_column` is not among them."""
    if text_column not in present:
        raise ValueError(
            f"{where}: there is no column {text_column!r}; the columns are {', '.join(map(repr, present)) or 'none'}. "
            "Name the right one with text_column"
        )
