"""A finished run for people: data, pages, W&B."""
