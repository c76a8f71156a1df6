"""Strict, torch-free readers of untrusted files."""
