"""What multiplies: QuantLinear, its variants, the backends. Knows no statistics and no model around it."""
