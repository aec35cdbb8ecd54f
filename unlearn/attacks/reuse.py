"""Answers of the retain model from an earlier attack: read where it was asked the very same, refused otherwise.

Attacks on several unlearned models compare with one retain model, whose half of the work is then done once.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.config import as_dict, parse_config
from lm.errors import UserError
from lm.run_folder import RunFolder, write_atomic
from unlearn.attacks.base import Trial
from unlearn.attacks.comparing import RETAIN
from unlearn.attacks.config import AttackConfig


def check_retain_answers(
    config: AttackConfig, trials: Sequence[Trial], *, weights: str, data: Mapping[str, str]
) -> None:
    """Refuse an earlier attack that asked the retain model anything else.

    Args:
        config: this attack; the earlier one is `config.retain_answers`.
        trials: of this attack.
        weights: the fingerprint of its retain model.
        data: the hashes of its rows.

    Raises:
        UserError: an earlier attack that has not ended, or had other weights, rows or settings.
    """
    folder = Path(str(config.retain_answers))
    if not (folder / "attack.json").is_file():
        raise UserError(f"retain_answers is {folder}, and there is no finished attack: give the run folder of one")
    earlier = parse_config(AttackConfig, ["--config", str(folder / "config.yaml")])
    manifest = RunFolder(folder).manifest
    _require_same(folder, "the hash of the retain model's weights", manifest["weights"].get(RETAIN), weights)
    for name in sorted(data.keys() | manifest["data"].keys()):
        _require_same(folder, f"the hash of the {name} rows", manifest["data"].get(name), data.get(name))
    for name, was, now in _settings(earlier, config):
        _require_same(folder, name, was, now)
    known = manifest.get("trials", {})
    for trial in trials:
        if trial.folder not in known:
            raise UserError(
                f"retain_answers is {folder}, which has no trial {trial.folder}: name an attack that has it, or leave it out"
            )
        _require_same(folder, f"the hash of the rows of the trial {trial.folder}", known[trial.folder], trial.data)
        was, now = (as_dict(each.attack.of_trial(trial)) for each in (earlier, config))
        _require_same(folder, "attack", was, now)


def copy_retain_answers(config: AttackConfig, run: RunFolder, trials: Sequence[Trial]) -> None:
    """Copy what the retain model answered in `config.retain_answers` into a run folder; what is there already stays."""
    folder = Path(str(config.retain_answers))
    for name in (f"before-{RETAIN}.json", f"before-{RETAIN}-others.json"):
        if (folder / name).exists() and not (run.path / name).exists():
            write_atomic(run.path / name, (folder / name).read_bytes(), private=True)
    for trial in trials:
        name = f"{trial.folder}/{RETAIN}"
        if not config.attack.finished(run.path / name):
            with run.writing(name) as copy:
                shutil.copytree(folder / name, copy, dirs_exist_ok=True)


def _settings(earlier: AttackConfig, config: AttackConfig) -> list[tuple[str, Any, Any]]:
    """What the answers depend on, beside the attack itself."""
    pairs = [(name, getattr(earlier, name), getattr(config, name)) for name in ("prompt", "max_new_tokens", "tasks")]
    for name in ("dtype", "attention"):
        pairs.append((f"retain_model.{name}", getattr(earlier.retain_model, name), getattr(config.retain_model, name)))
    return pairs


def _require_same(folder: Path, name: str, was: Any, now: Any) -> None:
    if was != now:
        raise UserError(
            f"retain_answers is {folder}, where {name} is {was} and not {now} as here: leave retain_answers out, or give the same"
        )
