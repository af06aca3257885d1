"""`python -m quad_modifiers` is the command `quad`."""

from quad_modifiers.tools.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
