"""Blocks that run in few passes: one adapter per block class. Knows block classes and what multiplies, not runs."""
