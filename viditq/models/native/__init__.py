"""Our own attention on a CPU: the kernel, its op, and how a denoiser comes to use it (model.attention=native)."""
