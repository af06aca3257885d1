"""A comparison of checkpoints as data: what was compared, what their files say, what was measured."""

from dataclasses import dataclass

from quad_modifiers.tools.inspection.measure.results import BlockRow, LossRow, Settings

NUMBERS_NAME = "comparison.json"


@dataclass(frozen=True)
class Score:
    """A result that stands in the checkpoint's evaluation.json.

    Attributes:
        what: text, window length and tokens of a perplexity, or task, metric and items: only like is beside like.
        is_perplexity: lower is better.
        value: the result.
        stderr: its standard error, if known.
        baseline: the original's, if measured.
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
        name: of its folder; unique in a comparison.
        folder: where it lies.
        format: what a reader needs for it.
        widths: bits such as "w4a4a8" (weights, U-type and D-type inputs), where they are uniform.
        modifiers: of its recipe, in order; empty if it has none.
        rank, basis: of the projection; rank 0 and None without one.
        bytes_of: size of the tensors by kind.
        scores: results that were measured before.
        loss: against the baseline, if there is one.
        blocks: likewise, by block.
        recipe: text of its recipe.yaml.
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
