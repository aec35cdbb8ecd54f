"""The stage `depth`: how deep unlearning went, layer by layer."""
