"""What is remembered of a checkpoint beside its weights: measurements, training, sizes."""
