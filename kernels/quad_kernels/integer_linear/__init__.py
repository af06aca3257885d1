"""Linear layer on integer weights and integer activations, with the full-precision outlier product."""
