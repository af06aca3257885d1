"""The llm-compressor modifiers of QUAD; importing a module of this package needs llmcompressor."""

# Importing llmcompressor registers the modifiers, which imports every module here: it must not happen for the first
# time inside one of them.
import llmcompressor  # noqa: F401
