"""`main`: the command `quad`. Each command is a function of a module here, and `main.py` lists them.

Nothing heavy is imported before a command runs: `quad --help` answers without torch, transformers or llm-compressor.
Every command is a thin layer over a Python function that its help names.
"""

from quad_modifiers.tools.cli.main import main

__all__ = ["main"]
