"""The head of a model whose rows are 8-bit integers: weight-only, one scale per row."""
