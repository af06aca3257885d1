"""`checksums.json`: a digest of every tensor of a checkpoint and of every other file that was written with it.

A flipped bit in a weight, or in a number of config.json, gives a model that loads and is another one. The file is
written last, into a folder that is not in its place yet.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quad_modifiers.records.inventory import INDEX_NAME, data_start, read_header, read_json, weight_files
from quad_modifiers.records.json_record import read_record
from quad_modifiers.reporting import layer_progress

CHECKSUMS_NAME = "checksums.json"
ENVIRONMENT_VARIABLE = "QUAD_VERIFY"
_LISTED = 5  # damages named in one error message
_PIECE = 2**24  # bytes that are read at once
_SHOWN = 200 * 2**20  # bytes from which a progress bar is worth its line
_WRITTEN_LATER = frozenset(("README.md", CHECKSUMS_NAME, "evaluation.json"))  # by `quad publish`, here, by `quad eval`


class Checksums(BaseModel):
    """The content of checksums.json.

    Attributes:
        format_version: 1; a reader refuses any other.
        algorithm: of all digests, which are hexadecimal.
        tensors: by name, the digest of a line with dtype (in safetensors' notation) and shape, and of the bytes.
        files: by name, the digests of the files that are not weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    algorithm: Literal["sha256"] = "sha256"
    tensors: dict[str, str] = Field(min_length=1)
    files: dict[str, str] = {}


def write_checksums(folder: Path) -> Checksums:
    """Digests what a checkpoint folder holds and writes the file; hidden files are left out.

    Raises:
        FileNotFoundError, ValueError: if the folder holds no weights, or they cannot be read.
    """
    return _write(folder, dict(_tensor_digests(weight_files(folder))))


def complete_checksums(folder: Path) -> Checksums:
    """Brings the file up to date behind other files that were written after the weights; without one, writes it."""
    known = read_checksums(folder)
    return write_checksums(folder) if known is None else _write(folder, known.tensors)


def _write(folder: Path, tensors: dict[str, str]) -> Checksums:
    found = Checksums(tensors=tensors, files={file.name: _file_digest(file) for file in _other_files(folder)})
    (folder / CHECKSUMS_NAME).write_text(found.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return found


def read_checksums(folder: Path) -> Checksums | None:
    """Returns the content of the file, None if there is none.

    Raises:
        ValueError: if it is damaged.
    """
    return read_record(Checksums, folder / CHECKSUMS_NAME)


def need_checksums(folder: Path) -> Checksums:
    """Returns the content of the file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    found = read_checksums(folder)
    if found is None:
        raise FileNotFoundError(
            f"{folder} has no {CHECKSUMS_NAME}: it was written without one, or it was not fetched with the rest; "
            "`quad verify --write` makes one of what is there now"
        )
    return found


def damages(folder: Path, wanted: Checksums, only: Collection[str] | None = None) -> list[str]:
    """Compares a folder with its checksums.

    Args:
        folder: a checkpoint.
        wanted: its checksums.
        only: names of the files besides the weights that are looked at; all by default.

    Returns:
        What differs, each named, tensors first. If weights cannot be read at all, because a file is truncated for
        example, that stands for all of them.
    """
    try:
        files = weight_files(folder)
        problems = [*_tensor_damages(files, wanted.tensors), *_misplaced(files)]
    except (OSError, ValueError) as error:
        problems = [str(error)]
    except (KeyError, IndexError, TypeError) as error:  # a header that is JSON, but without what it should say
        problems = [f"a header of {folder} has no {error}"]
    others = {name: digest for name, digest in wanted.files.items() if only is None or name in only}
    return problems + list(_file_damages(folder, others))


def refuse_damages(folder: Path, problems: list[str]) -> None:
    """Refuses a folder that is not what was written.

    Raises:
        ValueError: naming what differs.
    """
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(
            f"{folder} is not what was written: {'; '.join(problems[:_LISTED])}{more}; get it again, or, if you "
            "changed it yourself, run `quad verify --write`"
        )


def verify_loading(folder: Path) -> None:
    """Refuses weights and a config.json that are not what was written, if the environment variable QUAD_VERIFY asks.

    Raises:
        FileNotFoundError: if there are no checksums.
        ValueError: naming what differs.
    """
    if os.environ.get(ENVIRONMENT_VARIABLE, "0") not in ("", "0"):
        refuse_damages(folder, damages(folder, need_checksums(folder), only=("config.json",)))


def uncovered(folder: Path, wanted: Checksums) -> list[str]:
    """Returns the names of files that no checksum covers, such as a model card that was written later."""
    return [file.name for file in _other_files(folder, all_of_them=True) if file.name not in wanted.files]


def _tensor_damages(files: list[Path], wanted: dict[str, str]) -> Iterator[str]:
    found = dict(_tensor_digests(files))
    for name in sorted({*found, *wanted}):
        if name not in found:
            yield f"the tensor {name} is missing"
        elif name not in wanted:
            yield f"the tensor {name} was not there"
        elif found[name] != wanted[name]:
            yield f"the tensor {name} has changed"


def _misplaced(files: list[Path]) -> Iterator[str]:
    """What is not in the file where the index looks for it."""
    index = files[0].with_name(INDEX_NAME)
    places = read_json(index)["weight_map"] if index.is_file() else {}
    for file in files:
        for name in read_header(file):
            if places.get(name, file.name) != file.name:
                yield f"the tensor {name} is in {file.name}, but {INDEX_NAME} says {places[name]}"


def _file_damages(folder: Path, wanted: dict[str, str]) -> Iterator[str]:
    for name, digest in wanted.items():
        file = folder / name
        if not file.is_file():
            yield f"{name} is missing"
        elif _file_digest(file) != digest:
            yield f"{name} has changed"


def _tensor_digests(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    listed = [(file, name, entry) for file in files for name, entry in read_header(file).items()]
    large = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for _, _, entry in listed) > _SHOWN
    for file, name, entry in layer_progress(listed, "checksums", "tensor") if large else listed:
        digest = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
        begin, end = entry["data_offsets"]
        with file.open("rb") as stream:
            stream.seek(data_start(file) + begin)
            for place in range(begin, end, _PIECE):
                digest.update(stream.read(min(_PIECE, end - place)))
        yield name, digest.hexdigest()


def _other_files(folder: Path, all_of_them: bool = False) -> list[Path]:
    """Files of a folder that are not weights; those that others write into it later only if asked for."""
    files = (file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    left_out = {CHECKSUMS_NAME} if all_of_them else _WRITTEN_LATER
    return sorted(file for file in files if file.suffix != ".safetensors" and file.name not in left_out)


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
