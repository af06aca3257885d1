"""Fine-tuning of QUAD checkpoints through their outlier weights; nothing is here yet, OutlierLoRA will be."""
