"""Which files of a checkpoint folder are published, and what makes a folder unfit for it."""

from pathlib import Path

from quad_modifiers.records.export_record import read_export
from quad_modifiers.records.inventory import Inventory, read_inventory

CARD_NAME = "README.md"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")
_EXECUTED = (".py", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".so", ".dll")  # or may be
_UNFINISHED = (".tmp", ".part", ".partial", ".incomplete", ".lock")


def check_contents(folder: Path, needs_tokenizer: bool = True) -> Inventory:
    """Returns what a folder holds; refuses one that nobody should publish, before anything slow is done with it.

    Raises:
        FileNotFoundError: naming what is missing.
        ValueError: naming the file that is damaged or does not belong in a published checkpoint.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    inventory = read_inventory(folder)
    if inventory.is_plain and read_export(folder) is None:
        raise ValueError(f"{folder} holds an unquantized model; compress it first (quad compress)")
    if needs_tokenizer and not has_tokenizer(folder):
        raise FileNotFoundError(
            f"{folder} has no tokenizer, so nobody could use the model; save the original's into it: "
            f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({str(folder)!r})"
        )
    for path in files_to_publish(folder):
        if path.suffix in _EXECUTED:
            raise ValueError(f"{path} is code, or a format that can hold code; a checkpoint must not, remove it")
        if path.suffix in _UNFINISHED:
            raise ValueError(f"{path} looks unfinished; wait until it is written, or remove it")
    return inventory


def files_to_publish(folder: Path) -> list[Path]:
    """Returns the files of a folder and its subfolders, sorted; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def has_tokenizer(folder: Path) -> bool:
    """Returns whether transformers would find a tokenizer in the folder."""
    return any((folder / name).is_file() for name in _TOKENIZERS)
