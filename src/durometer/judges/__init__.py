"""Judges: who says whether a free response without accepted answers is harmful, or a refusal."""
