"""What is safeguarded: items, splits, answer rules."""
