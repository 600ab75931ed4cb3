"""Where a model comes from, and how it runs."""
