"""Which stage wrote a folder: told by a file or a setting that only that stage writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from lm.errors import UserError
from tracing.stages.depth.config import DepthConfig
from tracing.stages.retrace.config import RetraceConfig
from tracing.stages.trace.config import TraceConfig
from unlearn.attacks.config import AttackConfig
from unlearn.config import UnlearnConfig
from unlearn.evaluation.config import EvaluateConfig

Kind = Literal["trace", "unlearn", "evaluate", "attack", "retrace", "depth"]
RESULTS: dict[Kind, str] = {
    "evaluate": "scores.json",
    "attack": "attack.json",
    "depth": "depth.json",
    "retrace": "difference.json",
    "trace": "plan.json",
    "unlearn": "model/config.json",
}
"""A stage that a report shows -> the file that it writes when it has ended."""
CONFIGS: dict[Kind, type[Any]] = {
    "evaluate": EvaluateConfig,
    "attack": AttackConfig,
    "depth": DepthConfig,
    "retrace": RetraceConfig,
    "trace": TraceConfig,
    "unlearn": UnlearnConfig,
}
"""A stage that a report shows -> the class of its settings, by which older names are read."""
MAKES_A_MODEL = ("merge", "semeval")
"""Of the stages that no report shows, those whose model can be evaluated."""
_SETTINGS: dict[Kind, str] = {"trace": "corruption", "unlearn": "objective"}
"""Where other stages write such a file too: the setting that only this one has."""
_NOT_SHOWN = {
    "localizers": "localize",
    "models": "merge",
    "methods": "search",
    "per_row": "alternates",
    "autoencoders": "train-sae",
}
"""A setting -> the stage that alone has it, and that no report shows."""
_CACHE = "palimpsest-activations"
"""How the format begins that a cache of activations names in its manifest: it is all that `harvest` writes of a run."""


def settings_in(folder: Path) -> Mapping[str, Any]:
    """The settings of a run folder as plain data; empty if there are none. Raises UserError if the file is damaged."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged, it is no YAML: leave that run out") from None
    return values if isinstance(values, dict) else {}


def shown_stage(folder: Path) -> Kind | None:
    """The stage that has ended in this folder, if it is one that a report shows."""
    if not (folder / "config.yaml").is_file() or not_shown(folder) is not None:
        return None
    settings = settings_in(folder)
    ended = (kind for kind, name in RESULTS.items() if (folder / name).is_file())
    return next((kind for kind in ended if kind not in _SETTINGS or _SETTINGS[kind] in settings), None)


def not_shown(folder: Path) -> str | None:
    """The stage that wrote this folder, ended or not, if it is one that no report shows."""
    settings = settings_in(folder)
    stage = next((stage for name, stage in _NOT_SHOWN.items() if name in settings), None)
    if stage is None and not settings:
        stage = "harvest" if _is_cache(folder) else "semeval" if _is_submission(folder) else None
    return stage


def _is_cache(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and str(manifest.get("format")).startswith(_CACHE)


def _is_submission(folder: Path) -> bool:
    """A checkpoint with the run that made it inside, whose own model was moved out."""
    run = folder / "run"
    made = _SETTINGS["unlearn"] in settings_in(run) and not (run / RESULTS["unlearn"]).is_file()
    return made and (folder / "config.json").is_file()
