"""The root of the command line: the list of command groups, and what happens to their errors."""

import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from quad_modifiers.tools.brief_waiting import wait_briefly
from quad_modifiers.tools.cli import (
    compare,
    compress,
    evaluate,
    export,
    finetune,
    inspect,
    plugins,
    publish,
    recipes,
    support,
    verify,
)
from quad_modifiers.tools.cli.errors import INTERRUPTED, TERMINATED, describe, exit_code
from quad_modifiers.tools.console import show_warning

_DEBUG = "--debug"

# Each command's function, and the Python function that its help names.
_COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "compress": (compress.compress, "quad_modifiers.oneshot(model, recipe, output_dir=...)"),
    "finetune": (finetune.finetune, "quad_peft.training.finetune(checkpoint, output, ...)"),
    "merge": (finetune.merge, "quad_peft.training.merge(checkpoint, adapter, output)"),
    "eval": (evaluate.evaluate, "quad_modifiers.tools.evaluation.evaluate(model, tasks, baseline)"),
    "inspect": (inspect.inspect, "quad_modifiers.tools.inspection.inspect_model(model, output_dir, ...)"),
    "compare": (compare.compare, "quad_modifiers.tools.inspection.compare_checkpoints(checkpoints, output_dir, ...)"),
    "support": (support.support, "quad_modifiers.tools.support_table.supported()"),
    "plugins": (plugins.plugins, "quad_modifiers.plugins.plugin_table()"),
    "export": (
        export.export,
        "quad_modifiers.checkpoint.export.export_compressed_tensors(source_folder, target_folder), and "
        "quad_modifiers.checkpoint.dense.export_dense(source_folder, target_folder) for --format dense",
    ),
    "verify": (verify.verify, "quad_modifiers.records.checksums.damages(folder, need_checksums(folder))"),
    "publish": (
        publish.publish,
        "quad_modifiers.tools.publishing.publish(folder, repo_id, ...), and plan(...) for --dry-run",
    ),
}
_EXAMPLES = {
    "compress": "quad compress HuggingFaceTB/SmolLM2-135M-Instruct quad_w4a4 -o outputs/SmolLM2-quad",
    "finetune": "quad finetune outputs/my-quad --distill-from outputs/SmolLM2-135M -o outputs/adapter --merge "
    "outputs/my-quad-tuned\n\nOn several devices: accelerate launch -m quad_modifiers finetune ...",
    "merge": "quad merge outputs/my-quad outputs/adapter -o outputs/my-quad-tuned",
    "eval": "quad eval outputs/SmolLM2-quad --baseline outputs/SmolLM2-135M",
    "inspect": "quad inspect outputs/SmolLM2-135M -o outputs/report",
    "compare": "quad compare outputs/quad-w4a4 outputs/quad-w4a4a8 -o outputs/comparison",
    "support": "quad support HuggingFaceTB/SmolLM3-3B",
    "export": "quad export outputs/SmolLM2-quad -o outputs/plain --format dense",
    "verify": "quad verify outputs/SmolLM2-quad",
    "publish": "quad publish outputs/SmolLM2-quad me/SmolLM2-quad --base-model HuggingFaceTB/SmolLM2-135M --dry-run",
}

app = typer.Typer(
    name="quad",
    help="4-bit weights and activations for LLMs with a full-precision outlier subspace (QUAD, arXiv 2503.19353).",
    epilog="Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted, 143 terminated. Each command's help names its "
    "Python function.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for _name, (_function, _python) in _COMMANDS.items():
    _example = f"Example: {_EXAMPLES[_name]}\n\n" if _name in _EXAMPLES else ""
    app.command(_name, epilog=f"{_example}Python: {_python}")(_function)
app.add_typer(recipes.recipes, name="recipes")


def _show_version(wanted: bool) -> None:
    if wanted:
        from quad_modifiers.tools.cli.installed_versions import version_lines, version_warnings

        typer.echo("\n".join(version_lines()))
        for warning in version_warnings():
            typer.echo(f"warning: {warning}", err=True)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the versions found and stop."),
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
    wait_briefly()
    debug = _DEBUG in given
    given = [each for each in given if each != _DEBUG]
    with warnings.catch_warnings(), _tidy_termination() as terminated:
        if not debug:
            warnings.showwarning = show_warning
        try:
            code = int(app(args=given, prog_name="quad", standalone_mode=False) or 0)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            return _report(error, debug)
    if code == INTERRUPTED:  # newer versions of typer return it instead of raising
        print("terminated" if terminated else "interrupted", file=sys.stderr)
        return TERMINATED if terminated else code
    return code


@contextmanager
def _tidy_termination() -> Iterator[list[int]]:
    """Lets SIGTERM end a command as Ctrl-C does, so that it leaves no half file; yields what came of it."""
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread, which alone gets signals
        yield came
        return
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(error: Exception, debug: bool) -> int:
    """Prints an error as one line on stderr (a refused recipe: one line for each reason); returns the exit code."""
    if debug:
        traceback.print_exception(error)
    print(f"error: {describe(error)}", file=sys.stderr)
    return exit_code(error)
