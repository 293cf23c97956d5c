"""Other programs' quantized files, read into artifacts: codes, scales and zero points as they are."""
