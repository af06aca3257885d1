"""A comparison of checkpoints as data: what was compared, what their files say, what was measured."""

from dataclasses import dataclass

from quad_modifiers.tools.inspection.measure.results import BlockRow, LossRow, Settings

NUMBERS_NAME = "comparison.json"


@dataclass(frozen=True)
class Score:
    """A result from the checkpoint's evaluation.json.

    Attributes:
        what: text, window length and tokens of a perplexity, or task, metric and items: only like is beside like.
        is_perplexity: True for a perplexity, where lower is better.
        value: measured value.
        stderr: standard error of `value`, if known.
        baseline: value of the original, if measured.
        remark: "no difference seen" if the difference from the original is within its interval.
    """

    what: str
    is_perplexity: bool
    value: float
    stderr: float | None
    baseline: float | None
    remark: str = ""


@dataclass(frozen=True)
class Entry:
    """One checkpoint.

    Attributes:
        name: name of the folder; unique in a comparison.
        folder: path of the folder.
        format: format that a reader must know.
        widths: bits such as "w4a4a8" (weights, U-type and D-type inputs), where they are uniform.
        modifiers: modifiers of the recipe, in order; empty without a recipe.
        rank, basis: rank and basis of the projection; 0 and None without one.
        bytes_of: size of the tensors by kind.
        scores: results that were measured before.
        loss: loss against the baseline, if there is one.
        blocks: errors against the baseline by block, if there is one.
        recipe: text of recipe.yaml.
    """

    name: str
    folder: str
    format: str
    widths: str | None
    modifiers: list[str]
    rank: int
    basis: str | None
    bytes_of: dict[str, int]
    scores: list[Score]
    loss: LossRow | None
    blocks: list[BlockRow]
    recipe: str | None

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes_of.values())


@dataclass(frozen=True)
class Comparison:
    """Checkpoints in the order in which they were given; `settings` only with a baseline."""

    entries: list[Entry]
    baseline: str | None
    baseline_perplexity: float | None
    settings: Settings | None
    format_version: int = 1
