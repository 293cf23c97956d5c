"""Quantize image and video diffusion transformers, and judge what it cost."""
