"""A pipeline's folder in diffusers' layout whose denoisers are quantized, as `viditq.export.diffusers` writes it."""

DESCRIPTION = "viditq.json"  # beside model_index.json: the pipeline's settings, as a ModelAdapter has them
VERSION = 1
