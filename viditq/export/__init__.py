"""Artifacts in the file formats of other programs: one module for each."""
