"""What the recipe validator reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe; `line` counts from 1 and is None where there is no text."""

    line: int | None
    message: str
    remedy: str
    severity: Literal["error", "warning"] = "error"

    def describe(self, source: str) -> str:
        """Returns "source:line: message. remedy."."""
        place = source if self.line is None else f"{source}:{self.line}"
        kind = "warning: " if self.severity == "warning" else ""
        parts = [part.strip() for part in (self.message, self.remedy) if part.strip()]
        sentences = [part if part.endswith((".", "?", "!")) else f"{part}." for part in parts]
        return f"{place}: {kind}{' '.join(sentences)}"


class RecipeError(ValueError):
    """A recipe was refused; `problems` holds every reason, and the message lists them one a line."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = list(problems)
        super().__init__("the recipe cannot be used:\n" + "\n".join(each.describe(source) for each in problems))
