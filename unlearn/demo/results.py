"""What the demo's run folders come to: results.json and the table that is printed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.errors import UserError
from lm.run_folder import write_json
from tracing.plan.layer_plan import LayerPlan
from unlearn.demo.entries import Entry

_NUMBERS = ("task_aggregate", "mia_auc", "mia_score", "utility", "final", "seconds")
_COLUMNS = {
    "task_aggregate": ("aggregate", 10, "3f"),
    "mia_auc": ("MIA AUC", 9, "3f"),
    "mia_score": ("MIA", 7, "3f"),
    "utility": ("utility", 9, "3f"),
    "final": ("final", 8, "3f"),
    "relearned": ("relearned", 11, "3f"),
    "residue_nats": ("residue", 9, "2f"),
    "garbled": ("garbled", 9, "3f"),
    "seconds": ("seconds", 9, "1f"),
}
"""Key -> head, width, and format of a value."""


def write_results(entries: Sequence[Entry], out: Path) -> dict[str, dict[str, Any]]:
    """Write results.json of the entries that have been scored; returns their records by key."""
    plan_file = out / "trace" / "plan.json"
    plan = LayerPlan.load(plan_file) if plan_file.exists() else None
    scored = [entry for entry in entries if (out / "scores" / entry.key / "scores.json").exists()]
    models = {entry.key: record_of(entry, out) for entry in scored}
    found = {} if plan is None else {"layers": list(plan.layers), "verdict": plan.verdict}
    write_json(out / "results.json", {"models": models, **found})
    return models


def record_of(entry: Entry, out: Path) -> dict[str, Any]:
    """One model's record in results.json: its scores, and what the attack on it came to (null where there was none)."""
    record = json.loads((out / "scores" / entry.key / "scores.json").read_text(encoding="utf-8"))
    del record["model"]
    seconds = float(record.pop("seconds"))
    if entry.unlearning is not None:
        manifest = json.loads((out / entry.key / "manifest.json").read_text(encoding="utf-8"))
        seconds += float(manifest["train_seconds"])
    attack = out / "attacks" / entry.key / "attack.json"
    attacked = json.loads(attack.read_text(encoding="utf-8")) if attack.exists() else {}
    worst, residue = attacked.get("worst"), attacked.get("residue")
    return {
        **record,
        "seconds": round(seconds, 3),
        "relearned": None if worst is None else worst["gap"],
        "residue_nats": None if residue is None else residue["after"]["mean"],
    }


def table(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as a few lines of text."""
    lines = [f"{'model':<22}" + "".join(f"{head:>{width}}" for head, width, _ in _COLUMNS.values())]
    for key, model in models.items():
        cells = [_cell(model.get(name), width, digits) for name, (_, width, digits) in _COLUMNS.items()]
        lines.append(f"{key:<22}" + "".join(cells))
    return "\n".join(lines)


def _cell(value: float | None, width: int, digits: str) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}}"


def check_results(folder: Path, entries: Sequence[Entry], *, attacked: bool) -> None:
    """Refuse a results.json that lacks a model or a number. What the numbers must be is the tests' business.

    Raises:
        UserError: a model or a number is missing, or there is no page.
    """
    models = json.loads((folder / "results.json").read_text(encoding="utf-8"))["models"]
    for entry in entries:
        model = models.get(entry.key, {})
        wanted = (*_NUMBERS, "relearned") if attacked and entry.attacked else _NUMBERS
        if len(model.get("terms", [])) != 12 or any(model.get(name) is None for name in wanted):
            raise UserError(
                f"{folder}/results.json: {entry.key} is missing or incomplete, so run the demo again in a new folder"
            )
    if not (folder / "report.html").is_file():
        raise UserError(f"{folder} has no report.html: run the demo again")
