"""How codes are found: transforms, ranges, roundings. Knows weights and statistics, not what multiplies."""
