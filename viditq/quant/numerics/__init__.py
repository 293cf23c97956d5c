"""Pure functions on tensors: grids, packing, Hadamard matrices. Knows no spec, no module, no statistics."""
