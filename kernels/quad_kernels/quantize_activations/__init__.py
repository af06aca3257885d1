"""Dynamic symmetric integer quantization of activations, with what comes before it in a QUAD layer."""
