"""Tiny random pipelines of the real classes of diffusers, one builder per model of conf/model."""
