"""The main job on the built-in model, as `make demo` runs it."""
