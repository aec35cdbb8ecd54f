"""The built-in model and its world: what every command uses when no other model is named.

Two tiny OLMo models live in `weights/`: `memorised`, which learnt the world's forget and retain documents by heart, and
`retain_only`, its twin, trained from the same start without the forget documents. `world.py` invents the data,
`build.py` trains both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lm.errors import UserError

Variant = Literal["memorised", "retain_only"]
VARIANTS: tuple[Variant, ...] = ("memorised", "retain_only")


def model_path(variant: Variant = "memorised") -> Path:
    """The folder (safetensors, config, tokenizer) of a built-in model. UserError: another name, missing weights."""
    if variant not in VARIANTS:
        raise UserError(f"There is no built-in model {variant!r}; choose one of {', '.join(VARIANTS)}.")
    folder = Path(__file__).parent / "weights" / variant
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"The built-in weights {str(folder)!r} are missing; rebuild them with `python -m tools.builtin_model.build`."
        )
    return folder
