"""One function a command, without Hydra and printing."""
