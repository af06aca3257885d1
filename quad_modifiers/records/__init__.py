"""`read_evaluation`, `read_tuning`, `read_inventory`: a checkpoint's measurements, training and sizes."""
