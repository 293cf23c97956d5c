"""Many runs: records of a sweep's jobs, the table at its end, tuning. Knows what a run leaves, not how it is made."""
