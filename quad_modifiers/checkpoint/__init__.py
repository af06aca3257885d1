"""The QUAD checkpoint: its format, how it is written and how transformers loads it.

docs/reference/checkpoint-format.md is the specification.
"""

# The first import of transformers connects this package (quad_modifiers/connect.py), which imports the modules here;
# were it one of them that imports transformers first, the loader would find it half-made.
import transformers  # noqa: F401
