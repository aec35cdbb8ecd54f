"""The built-in model and its world: what every command uses when no other model is named.

Two tiny OLMo models live in `weights/`: `memorized`, which learned the world's forget and retain documents by heart, and
`retain_model`, the retain model, trained from the same start without the forget documents. `world.py` invents the data,
`tools.builtin_model.build` trains both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lm.errors import UserError

Variant = Literal["memorized", "retain_model"]
VARIANTS: tuple[Variant, ...] = ("memorized", "retain_model")
_FORMERLY: dict[str, Variant] = {"memorised": "memorized", "retain_only": "retain_model"}


def model_path(variant: Variant = "memorized") -> Path:
    """The folder (safetensors, config, tokenizer) of a built-in model. UserError: another name, missing weights."""
    variant = _FORMERLY.get(variant, variant)
    if variant not in VARIANTS:
        raise UserError(f"the built-in model {variant!r} is unknown: choose one of {', '.join(VARIANTS)}")
    folder = Path(__file__).parent / "weights" / variant
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"the built-in weights {str(folder)!r} are missing: rebuild them with `python -m tools.builtin_model.build`"
        )
    return folder
