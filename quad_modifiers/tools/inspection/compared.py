"""A comparison of checkpoints as data: what was compared, what their files say, what was measured."""

from dataclasses import dataclass, field

from quad_modifiers.reporting import file_size
from quad_modifiers.tools.inspection.measure.results import BlockRow, LossRow, Settings

NUMBERS_NAME = "comparison.json"


@dataclass(frozen=True)
class Score:
    """A result from the checkpoint's evaluation.json."""

    what: str  # text, window length and tokens of a perplexity, or task, metric and items: only like is beside like
    is_perplexity: bool  # True for a perplexity, where lower is better
    value: float  # measured value
    stderr: float | None  # standard error of `value`, if known
    baseline: float | None  # value of the original, if measured
    remark: str = ""  # "no difference seen" if the difference from the original is within its interval


@dataclass(frozen=True)
class Entry:
    """One checkpoint."""

    name: str  # name of the folder; unique in a comparison
    folder: str  # path of the folder
    format: str  # format that a reader must know
    widths: str | None  # bits such as "w4a4a8" (weights, U-type and D-type inputs), where they are uniform
    modifiers: list[str]  # modifiers of the recipe, in order; empty without a recipe
    # rank, basis: rank and basis of the projection; 0 and None without one
    rank: int
    basis: str | None
    bytes_of: dict[str, int]  # size of the tensors by kind
    scores: list[Score]  # results that were measured before
    loss: LossRow | None = None  # loss against the baseline, if there is one
    blocks: list[BlockRow] = field(default_factory=list)  # errors against the baseline by block, if there is one
    recipe: str | None = None  # text of recipe.yaml

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes_of.values())

    @property
    def embeddings(self) -> int:
        """Bytes of embedding and head."""
        return self.bytes_of.get("embedding", 0) + self.bytes_of.get("head", 0)


@dataclass(frozen=True)
class Comparison:
    """Checkpoints in the order in which they were given; `settings` only with a baseline."""

    entries: list[Entry]
    baseline: str | None = None
    baseline_perplexity: float | None = None
    settings: Settings | None = None
    format_version: int = 1


def comparison_rows(found: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns a table of one row for each property, one column a checkpoint: header and rows."""
    entries = found.entries
    rows = [
        ("recipe", *(" → ".join(entry.modifiers) or "-" for entry in entries)),
        ("bits", *(entry.widths or "-" for entry in entries)),
        ("rank", *(f"{entry.rank}, {entry.basis}" if entry.basis else "-" for entry in entries)),
        ("format", *(entry.format for entry in entries)),
        ("size", *(file_size(entry.total) for entry in entries)),
        ("embedding and head", *(file_size(entry.embeddings) for entry in entries)),
    ]
    for what in dict.fromkeys(score.what for entry in entries for score in entry.scores):
        scores = [next((score for score in entry.scores if score.what == what), None) for entry in entries]
        rows.append((what, *map(_score, scores)))
    if found.baseline_perplexity is not None:
        title = f"perplexity here (original {found.baseline_perplexity:.2f})"
        rows.append((title, *("-" if e.loss is None else f"{e.loss.perplexity:.2f}" for e in entries)))
        divergences = ("-" if e.loss is None else f"{e.loss.divergence:.4f}" for e in entries)
        rows.append(("divergence, nats", *divergences))
        last = (f"{e.blocks[-1].accumulated:.4f}" if e.blocks else "-" for e in entries)
        rows.append(("error of the last block", *last))
    return ("", *(entry.name for entry in entries)), rows


def _score(score: Score | None) -> str:
    if score is None:
        return "-"
    digits = 2 if score.is_perplexity else 4
    text = f"{score.value:.{digits}f}"
    if score.stderr is not None:
        text += f" ± {score.stderr:.{digits}f}"
    if score.baseline is None:
        return text
    remark = f", {score.remark}" if score.remark else ""
    return f"{text} (original {score.baseline:.{digits}f}{remark})"
