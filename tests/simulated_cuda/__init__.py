"""A CUDA device for machines without one: see device.py."""
