"""Runs lm-eval's command line with the model type `quad` and the offline tasks."""

import sys

from quad_modifiers.tools.evaluation.harness import TASKS_FOLDER, register


def main() -> None:
    """Runs lm-eval's command line on the arguments of this process."""
    from lm_eval.__main__ import cli_evaluate

    register()
    includes = any(argument.partition("=")[0] == "--include_path" for argument in sys.argv)
    if sys.argv[1:] and not includes and not {"-h", "--help"} & set(sys.argv):
        sys.argv += ["--include_path", str(TASKS_FOLDER)]
    cli_evaluate()


if __name__ == "__main__":
    main()
