"""Tasks of lm-eval (EleutherAI's language model evaluation harness) as measures.

``stress --measure lm-eval:TASK`` reads the subject in memory: prompts, choices, filters and scoring
rules are the harness's, likelihoods and generation are ours, so that no second copy of the weights
is loaded. Needs the extra ``benchmarks``.
"""

from durometer.measures.harness.measure import HARNESS

__all__ = ["HARNESS"]
