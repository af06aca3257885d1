"""The steps of weight quantization: what a scale costs, rounding with carried errors, and coordinate descent."""
