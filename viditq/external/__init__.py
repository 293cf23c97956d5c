"""Denoisers that another library quantizes while diffusers loads them: loading, and what of them is quantized."""
