"""What a checkpoint folder holds, read from config.json and the headers of its safetensors files, without torch."""

import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER = 100 * 2**20  # bytes; the limit of safetensors itself
_KINDS = {  # by the names of tensors, of every architecture; the first that fits counts
    "embedding": re.compile(r"embed_tokens"),
    "head": re.compile(r"lm_head|head_transform"),
    "outlier": re.compile(r"\.outlier\.weight"),
    "packed": re.compile(r"(^|\.)weight_(packed|shape|zero_point|sub_scale)[^.]*$"),
    "scale": re.compile(r"(^|\.)weight_(global_)?scale$"),
    "residual": re.compile(r"(_proj|\.residual)\.weight$"),
}
KIND_NAMES = {
    "packed": "packed weights of the linears",
    "scale": "scales of the packed weights",
    "outlier": "outlier weights",
    "residual": "unquantized weights of the linears",
    "embedding": "embedding",
    "head": "head",
    "other": "norms, biases and other parts",
}


@dataclass(frozen=True)
class Inventory:
    """The size of a checkpoint by kind of tensor.

    Attributes:
        config: config.json.
        format: format that a reader must know: "QUAD, version 1", "compressed-tensors, pack-quantized", "unquantized".
        bytes_of: bytes by kind, the keys of `KIND_NAMES`; kinds that do not occur are left out.
        tensors: number of tensors.
        dtype: dtype of the tensors that are not quantized, in safetensors' notation such as "BF16".
    """

    config: dict[str, Any]
    format: str
    bytes_of: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    dtype: str = ""

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes_of.values())

    @property
    def embeddings(self) -> int:
        """Bytes of embedding and head."""
        return self.bytes_of.get("embedding", 0) + self.bytes_of.get("head", 0)

    @property
    def is_plain(self) -> bool:
        """True if nothing is quantized."""
        return self.format == "unquantized"

    @property
    def quad(self) -> dict[str, Any] | None:
        """The `quad` section of a QUAD checkpoint."""
        section = (self.config.get("quantization_config") or {}).get("quad")
        return section if isinstance(section, dict) else None


def read_inventory(folder: Path) -> Inventory:
    """Reads a checkpoint folder."""
    config = read_json(folder / "config.json")
    bytes_of: dict[str, int] = dict.fromkeys(KIND_NAMES, 0)
    count, dtype = 0, ""
    for file in weight_files(folder):
        for name, entry in read_header(file).items():
            begin, end = entry["data_offsets"]
            kind = _kind(name)
            bytes_of[kind] += end - begin
            count += 1
            dtype = entry["dtype"] if name.endswith("norm.weight") else dtype
    present = {kind: size for kind, size in bytes_of.items() if size}
    return Inventory(config, _format(config), present, count, dtype)


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint: those of its index, and no others may be there, if it has one."""
    index = folder / INDEX_NAME
    found = sorted(folder.glob("*.safetensors"))
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file() and len(found) == 1:
            return found
        if not found:
            raise FileNotFoundError(f"{folder} has no weights ({SINGLE_NAME} or {INDEX_NAME}); it is not a checkpoint")
        names = ", ".join(file.name for file in found[:3])
        raise FileNotFoundError(f"{folder} holds {names} but no {INDEX_NAME}; the checkpoint is incomplete")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map; the checkpoint is damaged")
    listed = [folder / name for name in sorted(set(weight_map.values()))]
    for file in listed:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, but {INDEX_NAME} lists it; the checkpoint is incomplete")
    surplus = [file.name for file in found if file not in listed]
    if surplus:
        raise ValueError(f"{folder} holds {', '.join(surplus)}, which {INDEX_NAME} does not list; remove it")
    return listed


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Returns the entries of a safetensors file by tensor name, without its metadata."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER):
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, struct.error, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}); copy it again") from error
    if size != needed:
        raise ValueError(f"{file} has {size} bytes, its header says {needed}; it is truncated or damaged")
    return entries


def data_start(file: Path) -> int:
    """Returns the offset in a safetensors file that the offsets of its entries are counted from, in bytes."""
    with file.open("rb") as stream:
        return 8 + int(struct.unpack("<Q", stream.read(8))[0])


def read_json(file: Path) -> dict[str, Any]:
    """Returns a JSON object."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; it is not a checkpoint, or an incomplete one")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); the checkpoint is damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object; the checkpoint is damaged")
    return content


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), "other")


def _format(config: dict[str, Any]) -> str:
    section = config.get("quantization_config")
    if not isinstance(section, dict):
        return "unquantized"
    if section.get("quant_method") == "quad":
        quad = section.get("quad")
        return f"QUAD, version {quad.get('format_version') if isinstance(quad, dict) else 'unknown'}"
    return ", ".join(str(section[key]) for key in ("quant_method", "format") if section.get(key))
