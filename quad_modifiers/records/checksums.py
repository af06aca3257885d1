"""`checksums.json`: a digest of every tensor of a checkpoint and of every other file that was written with it.

A flipped bit in a weight, or in a number of config.json, gives a model that loads and is another one. The file is
written last, into a folder that is not in its place yet.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from quad_modifiers.output_folder import replace_file
from quad_modifiers.records.inventory import data_start, read_header, weight_files
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
        headers: by name of a weight file, the digest of what comes before its tensors.
        files: by name, the digests of the files that are not weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    algorithm: Literal["sha256"] = "sha256"
    tensors: dict[str, str] = Field(min_length=1)
    headers: dict[str, str] = Field(min_length=1)
    files: dict[str, str] = {}


class Damage(NamedTuple):
    """Something that is not what was written.

    Attributes:
        text: what it is and what has happened to it.
        file: its name, if it is a file that holds no weights.
    """

    text: str
    file: str | None = None


def write_checksums(folder: Path) -> Checksums:
    """Digests what a checkpoint folder holds and writes the file; hidden files are left out.

    Raises:
        FileNotFoundError, ValueError: if the folder holds no weights, or they cannot be read.
    """
    files = weight_files(folder)
    headers = {file.name: _header_digest(file) for file in files}
    return _write(folder, Checksums(tensors=dict(_tensor_digests(files)), headers=headers))


def complete_checksums(folder: Path) -> Checksums:
    """Brings the file up to date behind other files that were written after the weights; without one, writes it."""
    known = read_checksums(folder)
    return write_checksums(folder) if known is None else _write(folder, known)


def _write(folder: Path, of_weights: Checksums) -> Checksums:
    found = of_weights.model_copy(update={"files": {file.name: _file_digest(file) for file in _other_files(folder)}})
    replace_file(folder / CHECKSUMS_NAME, found.model_dump_json(indent=1) + "\n")
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


def damages(folder: Path, wanted: Checksums, only: Collection[str] | None = None) -> list[Damage]:
    """Compares a folder with its checksums.

    Args:
        folder: a checkpoint.
        wanted: its checksums.
        only: names of the files besides the weights that are looked at; all by default.

    Returns:
        What differs, weights first. If weights cannot be read at all, because a file is truncated for example, that
        stands for all of them.
    """
    found = list(_weight_damages(folder, wanted))
    for name, digest in wanted.files.items():
        if only is None or name in only:
            problem = _file_problem(folder / name, digest)
            found += [] if problem is None else [Damage(f"{name} {problem}", name)]
    return found


def refuse_damages(folder: Path, found: list[Damage]) -> None:
    """Refuses a folder that is not what was written.

    Raises:
        ValueError: naming what differs.
    """
    if found:
        listed = "; ".join(damage.text for damage in found[:_LISTED])
        more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        raise ValueError(
            f"{folder} is not what was written: {listed}{more}; get it again, or, if you changed it yourself, run "
            "`quad verify --write`"
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


def _weight_damages(folder: Path, wanted: Checksums) -> Iterator[Damage]:
    try:
        files = weight_files(folder)
        # A file that is not listed is a shard that somebody has made of the same tensors.
        listed = [file for file in files if file.name in wanted.headers]
        changed = [file.name for file in listed if _header_digest(file) != wanted.headers[file.name]]
        if changed:  # where it says that tensors are, others may be
            yield from (Damage(f"the header of {name} has changed") for name in changed)
            return
        found = dict(_tensor_digests(files))
    except (OSError, ValueError) as error:
        yield Damage(str(error))
        return
    except (KeyError, TypeError) as error:  # a header that is JSON, but does not say all
        yield Damage(f"a header of the weights lacks {error}")
        return
    for name in sorted({*found, *wanted.tensors}):
        if name not in found:
            yield Damage(f"the tensor {name} is missing")
        elif found[name] != wanted.tensors.get(name):
            yield Damage(f"the tensor {name} has changed")


def _file_problem(file: Path, digest: str) -> str | None:
    if not file.is_file():
        return "is missing"
    return None if _file_digest(file) == digest else "has changed"


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


def _header_digest(file: Path) -> str:
    """Of the first bytes of a weight file; ValueError if it is truncated there."""
    read_header(file)
    with file.open("rb") as stream:
        return hashlib.sha256(stream.read(data_start(file))).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
