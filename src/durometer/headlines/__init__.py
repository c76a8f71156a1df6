"""Whether a printed figure follows from the outcomes it was taken from, and what it is if not."""
