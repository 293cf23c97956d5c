"""Frozen words of a user or a file: formats, schemes, plans, recipes. Knows no model and no statistics."""
