"""Attacks on a subject, one file each."""
