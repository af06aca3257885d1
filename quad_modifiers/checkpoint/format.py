"""The `quad` section of `quantization_config` in config.json, versioned and checked.

Everything a runtime must know about the containers, beside what compressed-tensors' own config groups say about the
packed weights. A reader never ignores what it does not understand: unknown fields, terms and sections are refused.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator
from quad_kernels import InputQuantization, InputSplit, NumberFormat, WeightGrid
from quad_kernels.formats import weight_grid

FORMAT_VERSIONS = (1, 2, 3, 4, 5, 6, 7, 8)
QUANT_METHOD = "quad"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InputFormat(_Strict):
    """Dynamic quantization of a residual input."""

    bits: Literal[2, 3, 4, 5, 6, 7, 8]
    clip_ratio: float = Field(gt=0.0, le=1.0)
    group_size: int | None = None
    sub_scale_bits: Literal[4] | None = None
    symmetric: bool = True
    number_format: NumberFormat = "int"
    four_over_six: bool = False

    @model_validator(mode="after")
    def _check_grid(self) -> "InputFormat":
        self.settings()
        return self

    def settings(self) -> InputQuantization:
        """As the module uses it."""
        return InputQuantization(
            self.bits,
            self.clip_ratio,
            self.group_size,
            self.sub_scale_bits,
            self.symmetric,
            self.number_format,
            self.four_over_six,
        )


class WeightFormat(_Strict):
    """Packed residual weight."""

    bits: Literal[2, 4, 8]
    group_size: int | None = None
    symmetric: bool = True
    sub_scale_bits: Literal[4] | None = None
    number_format: NumberFormat = "int"

    @model_validator(mode="after")
    def _check_grid(self) -> "WeightFormat":
        self.grid()
        return self

    def grid(self) -> WeightGrid:
        """As the module uses it."""
        return weight_grid(self.bits, self.group_size, self.symmetric, self.sub_scale_bits, self.number_format)


class OutlierBlockFormat(_Strict):
    """Outlier weights in integers, with one scale per output channel, and maybe their inputs, one scale per token."""

    weight_bits: Literal[8] = 8
    input_bits: Literal[8] | None = None

    def input_settings(self) -> InputQuantization | None:
        """Quantization of the outlier input as the module uses it."""
        return None if self.input_bits is None else InputQuantization(self.input_bits)


class LinearFormat(_Strict):
    """One role, such as q_proj, the same in every block that no override names.

    `outlier` is None where the outlier weights are in full precision, or there are none. `terms` has the sections of
    further terms of the linear by kind; docs/developer/plugins.md says how to add a kind.
    """

    outliers_per_block: int = Field(ge=0)
    block: int = Field(ge=1)
    keep_width: bool
    hadamard: bool
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    bias: bool
    weight: WeightFormat | None
    input: InputFormat | None
    outlier: OutlierBlockFormat | None = None
    terms: dict[str, dict[str, Any]] = Field(default={})

    @model_validator(mode="after")
    def _check_outlier(self) -> "LinearFormat":
        if self.outlier is not None and not (self.outliers_per_block and self.weight):
            raise ValueError("outliers have 8 bits only where there are some, beside a quantized weight")
        if self.outlier is not None and self.outlier.input_bits is not None and self.input is None:
            raise ValueError("outlier inputs are quantized only where the others are")
        return self

    def split(self) -> InputSplit:
        """As the module uses it."""
        return InputSplit(self.in_features, self.outliers_per_block, self.block, self.keep_width, self.hadamard)

    def grids(self) -> list[WeightFormat | InputFormat]:
        """What is quantized of it."""
        return [part for part in (self.weight, self.input) if part is not None]


class OverrideFormat(_Strict):
    """Blocks in which the linears of a role have other bits: what takes the place of the role's weight and input.

    It is null exactly where that of the role is: what is quantized, and how inputs are split, does not change.
    """

    role: str
    layers: tuple[NonNegativeInt, ...] = Field(min_length=1)
    weight: WeightFormat | None
    input: InputFormat | None

    @model_validator(mode="after")
    def _check_layers(self) -> "OverrideFormat":
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"the layers of {self.role} must be in rising order, not {list(self.layers)}")
        return self

    def replaced(self, linear: LinearFormat) -> LinearFormat:
        """Returns the format of the role's linears in these blocks."""
        return linear.model_copy(update={"weight": self.weight, "input": self.input})


class BasisFormat(_Strict):
    """How the residual stream was projected: a record that no runtime needs."""

    basis: Literal["extended", "square"]
    rank: int
    hidden_size: int
    rotation: Literal["hadamard", "random", "none"]
    seed: int


class OutlierFormat(_Strict):
    """Storage of the outlier weights in versions 1 and 2: 16 means the model's dtype."""

    bits: Literal[16] = 16


class TableFormat(_Strict):
    """Packed embedding or head: symmetric, one scale per row, that is per entry of the vocabulary."""

    bits: Literal[8] = 8


class QuadFormat(_Strict):
    """The whole section. A checkpoint has the lowest version that can hold it, so that older readers read it too.

    Version 2 adds `embedding` and `head`. Version 3 adds `terms` of linears and `sections`, whose kinds plugins
    bring, and leaves out what the first two reserved. Version 4 adds `sub_scale_bits` of weights and inputs, version 5
    `outlier` of linears, version 6 `overrides`, linears that have other bits in some blocks, and `high` of the section
    `kv_cache`, version 7 `symmetric` of inputs, and `key_inverse` of that section, version 8 `number_format` of weights
    and inputs, and `four_over_six` of inputs.
    """

    format_version: Literal[1, 2, 3, 4, 5, 6, 7, 8] = 1
    base_model_type: str
    residual_basis: BasisFormat | None
    linears: dict[str, LinearFormat]
    overrides: tuple[OverrideFormat, ...] = ()
    embedding: TableFormat | None = None
    head: TableFormat | None = None
    sections: dict[str, dict[str, Any]] = Field(default={})
    outlier: OutlierFormat = OutlierFormat()
    low_rank: None = None
    kv_cache: None = None

    @model_validator(mode="after")
    def _check_version(self) -> "QuadFormat":
        unknown = self.model_fields_set & _ABSENT[self.format_version]
        if self.format_version < 3 and any("terms" in linear.model_fields_set for linear in self.linears.values()):
            unknown |= {"terms"}
        grids = [grid for linear in self.linears.values() for grid in linear.grids()]
        if self.format_version < 4 and any("sub_scale_bits" in grid.model_fields_set for grid in grids):
            unknown |= {"sub_scale_bits"}
        if self.format_version < 5 and any("outlier" in linear.model_fields_set for linear in self.linears.values()):
            unknown |= {"linears.outlier"}
        unknown |= {field for field, version in _late_fields(self.sections).items() if version > self.format_version}
        if self.format_version < 7 and any("symmetric" in each.model_fields_set for each in self._inputs()):
            unknown |= {"input.symmetric"}
        if self.format_version < 8:
            unknown |= {"number_format", "four_over_six"} & {n for each in self._grids() for n in each.model_fields_set}
        if unknown:
            raise ValueError(f"version {self.format_version} has no field {min(unknown)!r}")
        return self

    def _grids(self) -> list[WeightFormat | InputFormat]:
        grids = [grid for linear in self.linears.values() for grid in linear.grids()]
        return grids + [part for each in self.overrides for part in (each.weight, each.input) if part is not None]

    def _inputs(self) -> list[InputFormat]:
        stated = [each.input for each in self.linears.values()] + [each.input for each in self.overrides]
        return [each for each in stated if each is not None]

    @model_validator(mode="after")
    def _check_overrides(self) -> "QuadFormat":
        seen: set[tuple[str, int]] = set()
        for each in self.overrides:
            linear = self.linears.get(each.role)
            if linear is None:
                raise ValueError(f"overrides name the role {each.role!r}, which linears has not")
            if (each.weight is None, each.input is None) != (linear.weight is None, linear.input is None):
                raise ValueError(f"overrides of {each.role} must quantize what the role does: bits may differ alone")
            twice = seen & {(each.role, layer) for layer in each.layers}
            if twice:
                raise ValueError(f"overrides name {each.role} of layer {min(twice)[1]} twice")
            seen |= {(each.role, layer) for layer in each.layers}
        return self

    def of_layer(self, layer: int) -> dict[str, LinearFormat]:
        """Returns the formats of the linears of a block by role."""
        found = dict(self.linears)
        for each in self.overrides:
            if layer in each.layers:
                found[each.role] = each.replaced(self.linears[each.role])
        return found

    def variants(self) -> Iterator[tuple[str, LinearFormat]]:
        """Yields every format that linears have, with its role; several of a role that overrides name."""
        yield from self.linears.items()
        for each in self.overrides:
            yield each.role, each.replaced(self.linears[each.role])

    @classmethod
    def lowest(cls, **fields: Any) -> "QuadFormat":
        """Returns the section in the lowest version that holds its fields; empty ones are left out.

        Raises:
            ValueError: if a field has no place in the format.
        """
        fields = {name: value for name, value in fields.items() if value or name == "residual_basis"}
        named = any(linear.terms for linear in fields["linears"].values()) or "sections" in fields
        version = 3 if named else 2 if fields.keys() & {"embedding", "head"} else 1
        if any(grid.sub_scale_bits for linear in fields["linears"].values() for grid in linear.grids()):
            version = 4
        if any(linear.outlier for linear in fields["linears"].values()):
            version = 5
        if "overrides" in fields:
            version = 6
        version = max([version, *_late_fields(fields.get("sections", {})).values()])
        whole = cls(format_version=FORMAT_VERSIONS[-1], **fields)
        if any(not each.symmetric for each in whole._inputs()):
            version = 7
        if any(each.number_format != "int" for each in whole._grids()):
            version = 8
        return cls(format_version=version, **fields)

    def section(self) -> dict[str, Any]:
        """Returns the content for config.json: every field of its version."""
        content = self.model_dump(exclude=_ABSENT[self.format_version])
        for linear in content["linears"].values():
            if self.format_version < 3:
                del linear["terms"]
            if self.format_version < 5:
                del linear["outlier"]
            for grid in (linear["weight"], linear["input"]):
                if self.format_version < 4 and grid is not None:
                    del grid["sub_scale_bits"]
        for each in (*content["linears"].values(), *content.get("overrides", ())):
            if self.format_version < 7 and each["input"] is not None:
                del each["input"]["symmetric"]
            for grid in (each["weight"], each["input"]):
                if self.format_version < 8 and grid is not None:
                    del grid["number_format"]
                    grid.pop("four_over_six", None)
        return content


def _late_fields(sections: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Returns the later fields of sections of our own, and the versions that they came with.

    The section of a plugin has what the plugin says.
    """
    stated = sections.get("kv_cache", {})
    return {f"sections.kv_cache.{name}": version for name, version in _LATE_IN_CACHE.items() if name in stated}


_LATE_IN_CACHE = {"high": 6, "key_inverse": 7}


_RESERVED = {"outlier", "low_rank", "kv_cache"}
_LATER = {"overrides"}
_ABSENT = {
    1: {"embedding", "head", "sections", *_LATER},
    2: {"sections", *_LATER},
    **dict.fromkeys((3, 4, 5), _RESERVED | _LATER),
    **dict.fromkeys((6, 7, 8), _RESERVED),
}
"""Fields that a version does not have."""


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
            f"{', '.join(map(str, FORMAT_VERSIONS))}; upgrade with `pip install -U quad-modifiers`"
        )
    try:
        return QuadFormat.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"the quad section of quantization_config is damaged: {where}: {first['msg']}") from error
