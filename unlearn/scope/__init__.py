"""The axis "scope": which parameters may change, all of their entries or low-rank adapters."""

from unlearn.scope.scope import Lora, Scope

__all__ = ["Lora", "Scope"]
