"""`LayerPlan`: which layers and modules to train, why, and the controls to train beside them.

A small JSON file that training consumes and a person can read. Tracing says where information is carried, not where
training works best, so a plan always names its controls. How layers are chosen is `tracing.plan.choose`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import known_or_near
from lm.data.files import parse_json, read_text
from lm.errors import UserError
from lm.run_folder import write_json
from tracing.arrays import Array

PLAN_VERSION = 1
MODULES = ("mlp", "attn", "all")
_TYPES: dict[str, type] = {
    "layers": list,
    "modules": list,
    "rule": str,
    "singled_out": bool,
    "verdict": str,
    "evidence": dict,
    "controls": dict,
    "provenance": dict,
}


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """Which layers and modules to train, and why.

    Attributes:
        layers: the chosen layers, ascending, counted from 0.
        modules: `mlp`, `attn`, both, or `all` (whole blocks).
        rule: how they were chosen, in words.
        singled_out: whether the evidence prefers these layers to others; see `choose_layers`.
        verdict: the same as a sentence with numbers.
        evidence: layer scores with intervals, band scores, stability, caveats.
        controls: other layers to train for comparison: `random` and `inverse` of equal size, and `all`.
        provenance: model and the hash of its weights, noise, facts used (and their hash) and left out, prompt format, metric,
            window, seed.
    """

    layers: tuple[int, ...]
    modules: tuple[str, ...] = ("mlp",)
    rule: str = "chosen by hand"
    singled_out: bool = False
    verdict: str = "No evidence was asked for."
    evidence: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, layers in {"layers": self.layers, **{f"controls.{k}": v for k, v in self.controls.items()}}.items():
            whole = all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in layers)
            if not layers or not whole or list(layers) != sorted(set(layers)):
                raise UserError(
                    f"the plan's {name} are {list(layers)}: give whole numbers from 0 on, ascending, each once"
                )
        wrong = [module for module in self.modules if module not in MODULES]
        if wrong or not self.modules:
            near = known_or_near(wrong[0], MODULES) if wrong else ""
            raise UserError(f"the plan's modules are {list(self.modules)}{near}: use mlp, attn or all")

    @property
    def weights(self) -> str | None:
        """The `lm.model.fingerprint` of the model that was asked (by all localizers the same); None where nothing says
        it."""
        asked = [self.provenance, *dict(self.provenance.get("localizers", {})).values()]
        return next((str(one["weights"]) for one in asked if "weights" in one), None)

    def control(self, name: str) -> LayerPlan:
        """The plan with a control's layers in place of the chosen ones."""
        if name not in self.controls:
            near = known_or_near(name, list(self.controls))
            raise UserError(f"the plan has no control {name!r}{near}: it has {', '.join(self.controls) or 'none'}")
        verdict = f"A control ({name}), not chosen by evidence."
        return replace(self, layers=self.controls[name], rule=f"control: {name}", singled_out=False, verdict=verdict)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        write_json(Path(path), {"version": PLAN_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> LayerPlan:
        """Read a plan. Raises UserError for a missing or broken file, an unknown key or version, or impossible layers."""
        stored = _read(Path(path).expanduser())
        stored["controls"] = {name: tuple(layers) for name, layers in stored.get("controls", {}).items()}
        for name in ("layers", "modules"):
            if name in stored:
                stored[name] = tuple(stored[name])
        try:
            return cls(**stored)
        except UserError as error:
            raise UserError(f"in {path}: {error}") from error


def control_layers(chosen: Sequence[int], scores: Sequence[float] | Array, seed: int) -> dict[str, tuple[int, ...]]:
    """Layers to train for comparison with the chosen ones.

    Returns:
        `random`: as many layers drawn without replacement, not the chosen set. `inverse`: as many layers, the lowest
        scoring of those not chosen (then, if these are too few, the lowest scoring chosen ones). `all`: every layer.
        Where all layers are chosen there is only `all`.
    """
    layers, size = len(scores), len(chosen)
    every = tuple(range(layers))
    if size == layers:
        return {"all": every}
    generator = np.random.default_rng(seed)
    random = tuple(chosen)
    while set(random) == set(chosen):
        random = tuple(sorted(int(layer) for layer in generator.choice(layers, size, replace=False)))
    inverse = sorted(every, key=lambda layer: (layer in set(chosen), scores[layer], layer))[:size]
    return {"random": random, "inverse": tuple(sorted(inverse)), "all": every}


def layer_runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Neighboring layers as `[start, end)`."""
    runs: list[tuple[int, int]] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs


def layer_names(layers: Sequence[int]) -> str:
    """`layers 2-4, 7`, `layer 7`."""
    names = ", ".join(f"{start}-{end - 1}" if end - start > 1 else str(start) for start, end in layer_runs(layers))
    return f"layer{'s' if len(set(layers)) > 1 else ''} {names}"


def _read(path: Path) -> dict[str, Any]:
    """The plan's JSON object without its version, with every key known and of the right JSON type."""
    try:
        text = read_text(path)
    except UserError as error:
        if path.is_file():
            raise UserError(f"the layer plan {error}") from error
        raise UserError(f"there is no layer plan {path}: give the plan.json that `palimpsest trace` wrote") from error
    stored = parse_json(text, f"the layer plan {path}", remedy="trace again or mend it")
    if not isinstance(stored, dict):
        raise UserError(f"the layer plan {path} is not a JSON object: trace again or mend it")
    version = stored.pop("version", None)
    if version != PLAN_VERSION:
        raise UserError(f"the layer plan {path} has version {version}, this program reads {PLAN_VERSION}: trace again")
    for key, value in stored.items():
        if key not in _TYPES:
            raise UserError(
                f"the layer plan {path} has an unknown key {key!r}{known_or_near(key, list(_TYPES))}: mend it"
            )
        _require(isinstance(value, _TYPES[key]), path, key, value, _TYPES[key])
    if "layers" not in stored:
        raise UserError(f"the layer plan {path} has no layers: add a list such as [2, 3, 4]")
    for name, layers in stored.get("controls", {}).items():
        _require(isinstance(layers, list), path, f"controls.{name}", layers, list)
    lists = {
        "layers": stored["layers"],
        **{f"controls.{name}": each for name, each in stored.get("controls", {}).items()},
    }
    for name, layers in lists.items():
        if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
            raise UserError(f"the layer plan {path} has {name} {layers!r}: give whole numbers")
    if not all(isinstance(module, str) for module in stored.get("modules", ())):
        raise UserError(f"the layer plan {path} has modules {stored['modules']!r}: give names of modules")
    return stored


def _require(right: bool, path: Path, key: str, value: object, kind: type) -> None:
    if not right:
        what = {list: "a list", dict: "an object", str: "a text", bool: "true or false"}[kind]
        raise UserError(f"the layer plan {path} has {key} {value!r}: give {what}")
