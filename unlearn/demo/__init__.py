"""The main job on the built-in model, as `palimpsest demo` runs it."""
