"""What three ways of fine-tuning change in what a subject refuses, knows and is sure of."""
