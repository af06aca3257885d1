"""The QUAD checkpoint: its format, how it is written and how transformers loads it.

docs/reference/checkpoint-format.md is the specification.
"""
