"""Reading the numbers of a model: against its claimed base, or alone."""

from durometer.audit.forensics.comparison import alone, compare

__all__ = ["alone", "compare"]
