"""The axis "scope": which parameters may change, all of their entries or low-rank adapters."""
