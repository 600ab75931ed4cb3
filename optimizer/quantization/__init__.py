"""How numbers are rounded and packed."""
