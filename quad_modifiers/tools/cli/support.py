"""`quad support`: which models, recipes and runtimes go together."""

from typing import Annotated

import typer

from quad_modifiers.tools.console import print_table


def support(
    model: Annotated[
        str | None, typer.Argument(help="Folder or Hub id; its config alone is read. All model types if left out.")
    ] = None,
) -> None:
    """List the supported model types and what runs with each, or say it of one model.

    The exit code is 2 if the model is not supported; the error says why.
    """
    from quad_modifiers.tools.support_table import MODEL_HEADER, model_rows

    rows = list(model_rows())
    if model is not None:
        from quad_modifiers.checkpoint.opened import open_checkpoint

        found = open_checkpoint(model, known_only=True).architecture.model_type
        rows = [row for row in rows if row[0] == found] or [(found, *["by a plugin"] * (len(MODEL_HEADER) - 1))]
    print_table(MODEL_HEADER, rows)
