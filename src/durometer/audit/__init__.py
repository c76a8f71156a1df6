"""Audit of a downloaded model: files, provenance, template, tokenizer, weights against a base."""
