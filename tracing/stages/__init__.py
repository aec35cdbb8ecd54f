"""The stages from a config to files: each has its `config` and its `stage`."""
