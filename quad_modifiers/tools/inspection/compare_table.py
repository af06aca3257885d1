"""The table of a comparison, for the terminal and for the page: one row for each property, one column a checkpoint."""

from quad_modifiers.reporting import file_size
from quad_modifiers.tools.inspection.compared import Comparison, Score

_NOTHING = "-"


def comparison_rows(found: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the header and the rows; properties that no checkpoint has are left out."""
    entries = found.entries
    rows = [
        ("recipe", *(" → ".join(entry.modifiers) or _NOTHING for entry in entries)),
        ("bits", *(entry.widths or _NOTHING for entry in entries)),
        ("rank", *(f"{entry.rank}, {entry.basis}" if entry.basis else _NOTHING for entry in entries)),
        ("format", *(entry.format for entry in entries)),
        ("size", *(file_size(entry.total) for entry in entries)),
        ("embedding and head", *(file_size(_ends(entry.bytes_of)) for entry in entries)),
    ]
    for what in dict.fromkeys(score.what for entry in entries for score in entry.scores):
        scores = [next((score for score in entry.scores if score.what == what), None) for entry in entries]
        rows.append((what, *map(_score, scores)))
    if found.baseline_perplexity is not None:
        title = f"perplexity here (original {found.baseline_perplexity:.2f})"
        rows.append((title, *(_NOTHING if e.loss is None else f"{e.loss.perplexity:.2f}" for e in entries)))
        rows.append(
            ("divergence, nats", *(_NOTHING if e.loss is None else f"{e.loss.divergence:.4f}" for e in entries))
        )
        rows.append(
            ("error of the last block", *(f"{e.blocks[-1].accumulated:.4f}" if e.blocks else _NOTHING for e in entries))
        )
    return ("", *(entry.name for entry in entries)), rows


def _ends(bytes_of: dict[str, int]) -> int:
    return bytes_of.get("embedding", 0) + bytes_of.get("head", 0)


def _score(score: Score | None) -> str:
    if score is None:
        return _NOTHING
    digits = 2 if score.is_perplexity else 4
    text = f"{score.value:.{digits}f}"
    if score.stderr is not None:
        text += f" ± {score.stderr:.{digits}f}"
    if score.baseline is None:
        return text
    remark = f", {score.remark}" if score.remark else ""
    return f"{text} (original {score.baseline:.{digits}f}{remark})"
