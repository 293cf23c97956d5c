"""Where the error comes from: by layer and noise level, by outliers. Knows no search and no file."""
