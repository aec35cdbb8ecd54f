"""The attack stage from files to files: read rows, attack both models alike, compare, write. Wiring only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from lm.data.rows import Row
from lm.devices import accelerator, launch_facts, together
from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel, ModelSpec, fingerprint
from lm.prompts import PromptSpec, encode_pair
from lm.row_files import check_disjoint, data_hash, load_rows
from lm.run_folder import RunFolder, peak_memory_bytes, progress, write_atomic, write_json
from unlearn.attacks.answers import Answer, ask, read_answers, write_answers
from unlearn.attacks.base import Attack, Trial
from unlearn.attacks.config import AttackConfig
from unlearn.attacks.curves import Comparison, mean_over_trials
from unlearn.attacks.picture import curves_picture
from unlearn.evaluation.lume import check_rows
from unlearn.generation.batching import Workers

MODELS = ("unlearned", "retain_model")
_RETAIN_BEFORE = "never"
"""What folders and files of the retain model were called; an attack that was begun with them goes on."""
Curve = dict[str, list[Answer]]
"""Row id -> its answer at each level."""


@dataclass(frozen=True)
class AttackResult:
    """The comparison for each name that trials have, in order."""

    attack: Attack
    comparisons: tuple[Comparison, ...]

    def __str__(self) -> str:
        """A table and a sentence for each."""
        return "\n\n".join(
            f"{one.name}: {one.given:.0f} rows given, {len(one.ids)} rows of {one.people} people asked"
            + (f", {one.told:.0f} left out (a given row tells the answer)" if one.told else "")
            + f"\n{one.table(self.attack.unit)}\n{one.sentence(self.attack.words)}"
            for one in self.comparisons
        )


def run_attack(config: AttackConfig) -> AttackResult:
    """Attack as the config says; writes `attack.json`, `attack.png` and every answer into `config.out`.

    Raises:
        UserError: whatever the user can mend, before the models are attacked.
    """
    started = time.monotonic()
    forget, retain = load_rows(config.forget, columns=config.columns), load_rows(config.retain, columns=config.columns)
    check_disjoint(forget, retain)
    forget = _of_tasks(forget, config)
    check_rows(forget)
    trials = config.attack.trials(forget, retain, config.settings)
    acc = accelerator(cpu=config.model.device == "cpu")
    specs = dict(zip(MODELS, (config.model, config.retain_model), strict=True))
    run = RunFolder(config.out, main=acc.is_main_process)
    before = _before(config, specs, forget, run, acc)
    curves: dict[str, list[tuple[Trial, dict[str, Curve]]]] = {}
    clock = time.monotonic()
    for number, trial in enumerate(trials):
        left = (
            "" if not number else f", about {(time.monotonic() - clock) / number * (len(trials) - number):.0f} s left"
        )
        acc.print(
            f"== {type(config.attack).__name__}: {trial.name}, seed {trial.seed} ({number + 1} of {len(trials)}{left})"
        )
        found = {}
        for name, spec in specs.items():
            folder = run.path / trial.name / f"seed-{trial.seed}" / name
            later = config.attack.run(trial, spec, config.settings, folder)
            found[name] = _curve(trial.asked, before[name], [later[level] for level in config.attack.levels[1:]])
        curves.setdefault(trial.name, []).append((trial, found))
    result = AttackResult(config.attack, tuple(_compare(config, forget, each) for each in curves.values()))
    if acc.is_main_process:
        words = config.attack.words
        write_json(
            run.path / "attack.json",
            {
                "unit": config.attack.unit,
                "trials": [{**one.to_json(), "sentence": one.sentence(words)} for one in result.comparisons],
            },
        )
        write_atomic(run.path / "attack.png", curves_picture(result.comparisons, config.attack.unit))
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


def _before(
    config: AttackConfig, specs: Mapping[str, ModelSpec], forget: Sequence[Row], run: RunFolder, acc: Accelerator
) -> dict[str, Curve]:
    """Begin the run; what each model answers to all forget rows before it is attacked."""
    models = {name: load(spec, device=spec.device or str(acc.device)) for name, spec in specs.items()}
    require_alike(models["unlearned"], models["retain_model"], forget, config.prompt)
    with together(acc):
        if acc.is_main_process:
            if config.resume:
                _rename_what_is_old(run)
            facts = {
                "data": {
                    "forget": data_hash(forget),
                    "retain": data_hash(load_rows(config.retain, columns=config.columns)),
                },
                "weights": {name: fingerprint(model) for name, model in models.items()},
                "devices": launch_facts(acc),
            }
            RunFolder.create(config.out, config, resume=config.resume, facts=facts, same=("data", "weights"))
    found = {}
    for name, model in models.items():
        path = run.path / f"before-{name}.json"
        if not path.exists():
            with progress(len(forget), label=f"before: {name}", unit="rows", enabled=run.main) as advance:
                said = ask(
                    model,
                    forget,
                    config.prompt,
                    max_new_tokens=config.max_new_tokens,
                    batch_size=config.batch_size,
                    workers=Workers(acc.process_index, acc.num_processes),
                    progress=lambda done: advance(done * acc.num_processes),
                )
            if run.main:
                write_answers(path, said)
            acc.wait_for_everyone()
        found[name] = {one.id: [one] for one in read_answers(path)}
    return found


def _rename_what_is_old(run: RunFolder) -> None:
    """Give what an attack wrote before the retain model had its name that name; stopped in between, it is done again."""
    for path in [*run.path.glob(f"*/seed-*/{_RETAIN_BEFORE}"), run.path / f"before-{_RETAIN_BEFORE}.json"]:
        if path.exists():
            path.rename(path.with_name(path.name.replace(_RETAIN_BEFORE, "retain_model")))
    if (run.path / "manifest.json").exists() and _RETAIN_BEFORE in (weights := run.manifest.get("weights", {})):
        run.note(weights={"unlearned": weights["unlearned"], "retain_model": weights[_RETAIN_BEFORE]})


def require_alike(one: LanguageModel, other: LanguageModel, rows: Sequence[Row], prompt: PromptSpec) -> None:
    """Raise UserError unless two models have one shape and cut rows into the same tokens."""
    sizes = [(each.anatomy.layers, each.anatomy.hidden, each.anatomy.vocabulary) for each in (one, other)]
    if sizes[0] != sizes[1]:
        told = [f"{layers} layers of width {hidden} and {words} tokens" for layers, hidden, words in sizes]
        raise UserError(
            f"{one.name} has {told[0]}, and the retain model {other.name} has {told[1]}: give retain_model.path "
            "one of the same shape"
        )
    for row in rows:
        cut = [encode_pair(each.tokenizer, row.input, row.output, prompt).ids for each in (one, other)]
        if cut[0] != cut[1]:
            raise UserError(
                f"{other.name} cuts row {row.id} into other tokens than {one.name}: give it the same tokenizer"
            )


def _curve(asked: Sequence[Row], before: Curve, later: Sequence[Sequence[Answer]]) -> Curve:
    answers = [{one.id: one for one in level} for level in later]
    return {row.id: [*before[row.id], *(level[row.id] for level in answers)] for row in asked}


def _compare(
    config: AttackConfig, forget: Sequence[Row], found: Sequence[tuple[Trial, Mapping[str, Curve]]]
) -> Comparison:
    asked = {row.id for trial, _ in found for row in trial.asked}
    rows = [row for row in forget if row.id in asked]
    ids = [row.id for row in rows]
    values = {
        (name, what): mean_over_trials(
            [
                {one: [getattr(answer, what) for answer in answers] for one, answers in curves[name].items()}
                for _, curves in found
            ],
            ids,
        )
        for name in MODELS
        for what in ("score", "log_probability")
    }
    return Comparison(
        name=found[0][0].name,
        levels=config.attack.levels,
        ids=tuple(ids),
        documents=tuple(row.document for row in rows),
        kinds=tuple(str(row.kind) for row in rows),
        unlearned=values["unlearned", "score"],
        retain_model=values["retain_model", "score"],
        unlearned_log=values["unlearned", "log_probability"],
        retain_model_log=values["retain_model", "log_probability"],
        given=sum(len(trial.given) for trial, _ in found) / len(found),
        told=sum(trial.told for trial, _ in found) / len(found),
        margin=config.margin,
        confidence=config.confidence,
    )
