"""`main`: the command `quad`. Each command is a function of a module here, and `main.py` lists them.

Nothing heavy is imported before a command runs: `quad --help` answers without torch, transformers or llm-compressor.
Every command is a thin layer over a Python function that its help names.
"""

from quad_modifiers.tools.cli.without_typer import PACKAGES

try:
    from quad_modifiers.tools.cli.main import main
except ModuleNotFoundError as error:  # the base installation is for loading and serving
    if error.name not in PACKAGES:
        raise
    from quad_modifiers.tools.cli.without_typer import main

__all__ = ["main"]
