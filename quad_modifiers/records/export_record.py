"""`export.json`: what an exported checkpoint was made of, and what it lost or needs; kept with the checkpoint.

Exporting writes it, the model card reports it.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quad_modifiers.records.json_record import read_record

EXPORT_NAME = "export.json"


class Export(BaseModel):
    """The content of export.json.

    Attributes:
        format_version: 1; a reader refuses any other.
        format: what was written.
        source: format of the checkpoint that it was made of, such as "QUAD, version 1".
        notes: sentences on what was lost, and on what computes the checkpoint and what does not.
        package: version of quad-modifiers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    format: Literal["dense", "compressed-tensors"]
    source: str = Field(min_length=1)
    notes: tuple[str, ...] = ()
    package: str


def read_export(folder: Path) -> Export | None:
    """Returns the record in a folder, None if there is none; ValueError names the field that is wrong."""
    return read_record(Export, folder / EXPORT_NAME)
