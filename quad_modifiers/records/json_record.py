"""Reads the records that are kept as JSON beside a checkpoint."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

_Record = TypeVar("_Record", bound=BaseModel)


def read_record(record: type[_Record], file: Path) -> _Record | None:
    """Returns the record in a file, None if there is no file; ValueError names the field that is wrong."""
    if not file.is_file():
        return None
    try:
        return record.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "the file"
        raise ValueError(f"{file}: {where}: {first['msg']}; correct it, or remove the file") from error
