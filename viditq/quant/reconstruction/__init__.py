"""What is learned block by block: kept inputs of blocks, roundings. Knows no whole model and no artifact."""
