"""Which bits where: candidates, their costs, the allocation. Knows no prompts, samples or files."""
