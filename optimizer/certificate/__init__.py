"""What may be said of a plan after measuring it on held-out text."""
