"""The model under test: loading, chat format, fingerprint, built-in models."""
