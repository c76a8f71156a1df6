"""What makes a subject harder to break."""
