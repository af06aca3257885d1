"""The root of the command line: the list of command groups, and what happens to their errors."""

import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from quad_modifiers.tools.cli import compare, compress, evaluate, export, finetune, inspect, plugins, publish, recipes
from quad_modifiers.tools.cli.errors import INTERRUPTED, describe, exit_code
from quad_modifiers.tools.console import show_warning

_DEBUG = "--debug"

app = typer.Typer(
    name="quad",
    help="4-bit weights and activations for LLMs with a full-precision outlier subspace (QUAD, arXiv 2503.19353).",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted. Each command's help names its Python function.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for group in (compress, finetune, evaluate, inspect, compare, recipes, plugins, export, publish):
    group.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from quad_modifiers import __version__

        typer.echo(f"quad-modifiers {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show the traceback of an error. May be given anywhere.")] = False,
) -> None:
    """Options of `quad` itself; `main` acts on --debug."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `quad` and returns its exit code.

    Args:
        arguments: arguments without the program's name; those of the process by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = _DEBUG in given
    given = [each for each in given if each != _DEBUG]
    with warnings.catch_warnings():
        if not debug:
            warnings.showwarning = show_warning
        try:
            code = int(app(args=given, prog_name="quad", standalone_mode=False) or 0)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            return _report(error, debug)
    if code == INTERRUPTED:  # newer versions of typer return it instead of raising
        print("interrupted", file=sys.stderr)
    return code


def _report(error: Exception, debug: bool) -> int:
    """Prints an error as one line on stderr (a refused recipe: one line for each reason); returns the exit code."""
    if debug:
        traceback.print_exception(error)
    print(f"error: {describe(error)}", file=sys.stderr)
    return exit_code(error)
