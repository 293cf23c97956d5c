"""What was seen: noise levels, observers, their statistics. Knows no method that reads them."""
