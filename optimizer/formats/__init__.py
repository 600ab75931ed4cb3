"""One file per engine: write a plan as a model that the engine loads, read it back, check it."""
