"""Training, generation, edits, budgets, seeds, statistics: what everything else stands on."""
