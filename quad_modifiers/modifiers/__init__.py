"""The llm-compressor modifiers of QUAD; importing a module of this package needs llmcompressor."""
