"""What a model loses by each part at few bits and at 8, and what the bits take: a record that can be kept."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from quad_modifiers.records.json_record import read_record

WIDE = 8
"""Bits that a part may get instead of the recipe's."""

Kind = Literal["weights", "inputs"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(_Strict):
    """The weights, or the inputs, of one group of linears in consecutive blocks.

    Attributes:
        kind: weights or inputs.
        group: name of the group, such as "gate_up".
        roles: its linears.
        first: number of the first block.
        last: number of the last block.
        bits: what the recipe gives it.
        weights: weights of these linears in the original, which are also their multiplications for a token.
        extra: bits that the checkpoint takes more if the part has 8; 0 for inputs.
        narrow: divergence with this part alone at the recipe's bits, nats.
        wide: the same at 8 bits.
    """

    kind: Kind
    group: str
    roles: tuple[str, ...]
    first: int = Field(ge=0)
    last: int = Field(ge=0)
    bits: int
    weights: int = Field(gt=0)
    extra: int = Field(ge=0)
    narrow: float
    wide: float

    @property
    def cost(self) -> int:
        """Bits that 8 take more: stored ones of weights, of inputs those that all its multiplications read."""
        return self.extra if self.kind == "weights" else (WIDE - self.bits) * self.weights

    @property
    def gain(self) -> float:
        """By how much the divergence falls with 8 bits, nats."""
        return self.narrow - self.wide


class Sensitivities(_Strict):
    """All parts of a model under a recipe.

    Attributes:
        format_version: 1; a reader refuses any other.
        model: name of the model.
        model_type: of the original.
        layers: number of its blocks.
        recipe: name of the recipe.
        recipe_digest: SHA-256 of its text, in hexadecimal.
        text: origin of the text.
        windows: windows of it that were measured on.
        window_length: tokens of each.
        seed: seed that chose the windows.
        weights: weights of all decoder linears in the original.
        stored: bits that they take in the checkpoint of the recipe, scales and outlier columns with them.
        outliers: how many of those the outlier columns take.
        parts: weights before inputs, in the order of the blocks; inputs only if they were asked for.
    """

    format_version: Literal[1] = 1
    model: str
    model_type: str
    layers: int
    recipe: str
    recipe_digest: str
    text: str
    windows: int
    window_length: int
    seed: int
    weights: int = Field(gt=0)
    stored: int = Field(gt=0)
    outliers: int = Field(ge=0)
    parts: tuple[Part, ...]

    def of(self, kind: Kind) -> list[Part]:
        """Returns the parts of a kind."""
        return [part for part in self.parts if part.kind == kind]

    def average(self, kind: Kind, wide: Iterable[Part] = ()) -> float:
        """Returns the bits per weight, or of an input per multiplication, with some parts at 8 bits."""
        more = sum(part.cost for part in wide if part.kind == kind)
        if kind == "weights":
            return (self.stored + more) / self.weights
        parts = self.of(kind)
        return (sum(part.bits * part.weights for part in parts) + more) / sum(part.weights for part in parts)


def read_sensitivities(file: Path) -> Sensitivities:
    """Returns the record in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming the field that is wrong.
    """
    found = read_record(Sensitivities, file)
    if found is None:
        raise FileNotFoundError(f"there is no file {file} of sensitivities; --save writes one")
    return found
