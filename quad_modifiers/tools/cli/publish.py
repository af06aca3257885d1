"""`quad publish`: from a checkpoint folder to a repository on the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quad_modifiers.reporting import file_size
from quad_modifiers.tools.cli.options import expanded
from quad_modifiers.tools.console import log_on_stderr, print_table

if TYPE_CHECKING:
    from quad_modifiers.tools.publishing import Plan


def publish(
    folder: Annotated[
        Path, typer.Argument(help="A checkpoint that `quad compress` or `quad export` wrote.", callback=expanded)
    ],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the Hub; created if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, print the files and the card, and upload and write nothing.")
    ] = False,
    base_model: Annotated[str | None, typer.Option(metavar="ID", help="Hub id of the original model.")] = None,
    license: Annotated[
        str | None, typer.Option(metavar="ID", help="License of the original; by default that of its card.")
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Of the Hub. Better: `hf auth login` or HF_TOKEN, which leave no trace in the history."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; created if missing. main by default.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    skip_check: Annotated[
        bool, typer.Option("--skip-check", help="Do not load the checkpoint in a fresh process first.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another model that the repository holds.")
    ] = False,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub.

    Checks the folder and loads it in a fresh process, writes the model card (README.md; one that you wrote is kept),
    and uploads everything in one commit. After an interruption the same command resumes where it stopped.
    """
    from quad_modifiers.tools import publishing

    model: dict[str, Any] = {"base_model": base_model, "license": license, "token": token, "check": not skip_check}
    if dry_run:
        with log_on_stderr():
            planned = publishing.plan(folder, repo_id, **model)
        _print_plan(planned)
        typer.echo(f"\n{planned.card}", nl=False)
        return
    with log_on_stderr():
        commit: dict[str, Any] = {"private": private, "revision": revision, "message": message, "overwrite": overwrite}
        done = publishing.publish(folder, repo_id, **model, **commit)
    _print_plan(done.plan)
    for name in done.removed:
        typer.echo(f"removed {name}, which the earlier checkpoint left")
    typer.echo(done.url)


def _print_plan(planned: "Plan") -> None:
    rows = [(name, file_size(size)) for name, size in planned.files]
    print_table(("file", "size"), [*rows, ("all", file_size(planned.total))], title=planned.repo_id)
    seen = planned.impression
    if seen is not None:
        typer.echo(f"loads as {seen.model_class} in {seen.seconds:.1f} s and continues: {seen.generated!r}")
