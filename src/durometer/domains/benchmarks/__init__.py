"""The field's benchmarks as domains, read from the user's own copy; nothing of them is shipped."""
