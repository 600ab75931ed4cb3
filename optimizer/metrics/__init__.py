"""How far a model moved from its reference."""
