"""Measurements behind the numbers in README.md; `python -m quad_modifiers.tools.bench --help`."""
