"""The `quad` section of `quantization_config` in config.json, versioned and checked.

Everything a runtime must know about the containers, beside what compressed-tensors' own config groups say about the
packed weights. Fields that later methods will use are part of the format already and refused while unknown: a reader
never ignores what it does not understand.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from quad_modifiers.nn.input_split import InputQuantization, InputSplit

FORMAT_VERSIONS = (1, 2)
QUANT_METHOD = "quad"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputFormat(_Strict):
    """Dynamic quantization of a residual input."""

    bits: Literal[2, 3, 4, 5, 6, 7, 8]
    clip_ratio: float = Field(gt=0.0, le=1.0)
    group_size: int | None = None

    def settings(self) -> InputQuantization:
        """As the module uses it."""
        return InputQuantization(self.bits, self.clip_ratio, self.group_size)


class WeightFormat(_Strict):
    """Packed residual weight."""

    bits: Literal[2, 4, 8]
    group_size: int | None = None
    symmetric: bool = True


class LinearFormat(_Strict):
    """One role, such as q_proj, the same in every block."""

    outliers_per_block: int = Field(ge=0)
    block: int = Field(ge=1)
    keep_width: bool
    hadamard: bool
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    bias: bool
    weight: WeightFormat | None
    input: InputFormat | None

    def split(self) -> InputSplit:
        """As the module uses it."""
        return InputSplit(self.in_features, self.outliers_per_block, self.block, self.keep_width, self.hadamard)


class BasisFormat(_Strict):
    """How the residual stream was projected; for people and for reproducing, not needed to run."""

    basis: Literal["extended", "square"]
    rank: int
    hidden_size: int
    rotation: Literal["hadamard", "random", "none"]
    seed: int


class OutlierFormat(_Strict):
    """Storage of the outlier weights: 16 means the model's dtype (8 bits are reserved for ResQ)."""

    bits: Literal[16] = 16


class TableFormat(_Strict):
    """Packed embedding or head: symmetric, one scale per row, that is per entry of the vocabulary."""

    bits: Literal[8] = 8


class QuadFormat(_Strict):
    """The whole section; `embedding` and `head` are the fields that version 2 adds."""

    format_version: Literal[1, 2] = 1
    base_model_type: str
    residual_basis: BasisFormat | None
    outlier: OutlierFormat = OutlierFormat()
    linears: dict[str, LinearFormat]
    embedding: TableFormat | None = None
    head: TableFormat | None = None
    low_rank: None = None
    kv_cache: None = None

    @model_validator(mode="after")
    def _check_version(self) -> "QuadFormat":
        added = self.model_fields_set & _ADDED_IN_2
        if self.format_version == 1 and added:
            raise ValueError(f"version 1 has no field {min(added)!r}")
        return self

    def section(self) -> dict[str, Any]:
        """As it stands in config.json: every field of its version."""
        return self.model_dump(exclude=_ADDED_IN_2 if self.format_version == 1 else None)


_ADDED_IN_2 = {"embedding", "head"}


def read_format(section: Any) -> QuadFormat:
    """Returns the checked section.

    Raises:
        ValueError: if it is missing, of another version, or has a field this version does not know.
    """
    if not isinstance(section, dict):
        raise ValueError("quantization_config has no 'quad' section; this is no QUAD checkpoint, or it was edited")
    version = section.get("format_version")
    if version not in FORMAT_VERSIONS:
        raise ValueError(
            f"the checkpoint has QUAD format version {version!r}, this package reads versions "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}; upgrade with `pip install -U quad-modifiers`"
        )
    try:
        return QuadFormat.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"the quad section of quantization_config is damaged: {where}: {first['msg']}") from error
