"""The command line: the only home of Hydra and rich."""
