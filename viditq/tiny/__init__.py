"""Training of the shipped tiny models and judges (see scripts/train_tiny.py)."""
