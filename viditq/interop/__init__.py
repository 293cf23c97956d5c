"""viditq inside other people's programs: what lets diffusers load, save and sample quantized models by itself."""
