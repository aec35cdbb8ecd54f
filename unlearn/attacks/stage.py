"""The attack stage from files to files: read rows, attack both models alike, compare, write. Wiring only.

The same on objects in memory is `unlearn.attack`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from accelerate import Accelerator

from lm.data.rows import Row
from lm.devices import accelerator, launch_facts, together
from lm.errors import UserError
from lm.loading import load
from lm.model import fingerprint
from lm.row_files import check_disjoint, data_hash, load_rows
from lm.run_folder import RunFolder, peak_memory_bytes, stage, write_atomic, write_json
from unlearn.attacks.attacking import ask_before, attack_all, require_alike
from unlearn.attacks.base import Attacked
from unlearn.attacks.comparing import RETAIN, UNLEARNED
from unlearn.attacks.comparison.picture import curves_picture
from unlearn.attacks.config import AttackConfig
from unlearn.attacks.others import others_of
from unlearn.attacks.parallel import run_trials
from unlearn.attacks.result import AttackResult
from unlearn.attacks.reuse import check_retain_answers, copy_retain_answers
from unlearn.evaluation.lume import check_rows

_RETAIN_BEFORE = "never"
"""What folders and files of the retain model were called; an attack that was begun with them goes on."""


@stage
def run_attack(config: AttackConfig) -> AttackResult:
    """Attack as the config says; writes `attack.json`, `attack.png` and every answer into `config.out`.

    Raises:
        UserError: whatever the user can mend, before the models are attacked.
    """
    started = time.monotonic()
    forget, retain = load_rows(config.forget, columns=config.columns), load_rows(config.retain, columns=config.columns)
    unseen = () if config.unseen is None else load_rows(config.unseen, columns=config.columns)
    check_disjoint(forget, retain)
    forget = _of_tasks(forget, config)
    check_rows((*forget, *unseen))
    others = others_of(forget, retain, unseen)
    trials = [others.beside(trial) for trial in config.attack.trials(forget, retain, config.settings)]
    acc = accelerator(cpu=config.model.device == "cpu")
    if acc.num_processes > 1 and config.workers > 1:
        raise UserError(
            f"workers is {config.workers}, and the attack was launched on {acc.num_processes} processes: leave workers out, or "
            "use python, not accelerate launch"
        )
    specs = {UNLEARNED: config.model, RETAIN: config.retain_model}
    models = {name: load(spec, device=spec.device or str(acc.device)) for name, spec in specs.items()}
    require_alike(models[UNLEARNED], models[RETAIN], (*forget, *others.rows), config.prompt)
    data = {"forget": data_hash(forget), "retain": data_hash(retain)}
    data |= {"unseen": data_hash(unseen)} if unseen else {}
    weights = {name: fingerprint(model) for name, model in models.items()}
    if config.retain_answers is not None:
        check_retain_answers(config, trials, weights=weights[RETAIN], data=data)
    run = _begin(acc, config, {"data": data, "weights": weights, "trials": {one.folder: one.data for one in trials}})
    if config.retain_answers is not None:
        with together(acc):
            if acc.is_main_process:
                copy_retain_answers(config, run, trials)
    before = ask_before(acc, models, forget, others, config.settings, run)
    del models  # each attack begins with a fresh one
    if config.workers > 1:
        run_trials(specs, trials, config.attack, config.settings, run, workers=config.workers)
    subjects = {name: Attacked.from_spec(spec) for name, spec in specs.items()}
    result = attack_all(
        acc,
        subjects,
        before,
        trials,
        forget,
        others,
        config.attack,
        config.settings,
        run,
        margin=config.margin,
        confidence=config.confidence,
    )
    if acc.is_main_process:
        write_json(run.path / "attack.json", result.to_json())
        write_atomic(run.path / "attack.png", curves_picture(result.comparisons, config.attack.unit, result.worst))
        if "finished" not in run.manifest:  # what was only read back took no time
            run.finish(seconds=round(time.monotonic() - started, 3), peak_memory_bytes=peak_memory_bytes())
    acc.wait_for_everyone()
    return result


def describe(config: AttackConfig, result: AttackResult) -> str:
    """What a finished attack says: the curves as tables, a sentence for each, and where everything is."""
    return f"{result}\nwrote {config.out}/attack.json and attack.png"


def _of_tasks(rows: Sequence[Row], config: AttackConfig) -> tuple[Row, ...]:
    kept = tuple(row for row in rows if not config.tasks or row.task in config.tasks)
    if not kept:
        have = ", ".join(sorted({row.task for row in rows}))
        raise UserError(f"{config.forget} has no rows of {', '.join(config.tasks)} (it has {have}): set tasks to one")
    return kept


def _begin(acc: Accelerator, config: AttackConfig, facts: Mapping[str, object]) -> RunFolder:
    """Begin the run folder, or go on with one, on the main process; the others wait."""
    run = RunFolder(config.out, main=acc.is_main_process)
    with together(acc):
        if acc.is_main_process:
            if config.resume:
                _rename_what_is_old(run)
            RunFolder.create(
                config.out,
                config,
                resume=config.resume,
                facts={**facts, "devices": launch_facts(acc)},
                same=("data", "weights"),
                free=("workers", "retain_answers"),
            )
    return run


def _rename_what_is_old(run: RunFolder) -> None:
    """Give what an attack wrote before the retain model had its name that name; stopped in between, it is done again."""
    for path in [*run.path.glob(f"*/seed-*/{_RETAIN_BEFORE}"), run.path / f"before-{_RETAIN_BEFORE}.json"]:
        if path.exists():
            path.rename(path.with_name(path.name.replace(_RETAIN_BEFORE, RETAIN)))
    if (run.path / "manifest.json").exists() and _RETAIN_BEFORE in (weights := run.manifest.get("weights", {})):
        run.note(weights={UNLEARNED: weights[UNLEARNED], RETAIN: weights[_RETAIN_BEFORE]})
