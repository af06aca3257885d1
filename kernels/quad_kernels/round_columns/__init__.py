"""The steps of weight quantization that go column by column: rounding with carried errors, and coordinate descent."""
