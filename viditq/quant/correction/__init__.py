"""What of the error is known in advance (PTQD). Knows no search and no file."""
