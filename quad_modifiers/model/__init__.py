"""Models as data: which linears a decoder block has, and the sizes of a model."""
