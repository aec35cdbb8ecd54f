"""Activations on disk: written block by block, shuffled, in shards; read back in any order."""
