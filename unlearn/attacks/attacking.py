"""Models in memory under attack: asked before, attacked trial by trial, compared. `unlearn.attacks.stage` does it from files."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from accelerate import Accelerator

from lm.data.rows import Row
from lm.devices import accelerator, load_here
from lm.errors import UserError
from lm.model import LanguageModel, ModelSpec
from lm.prompts import PromptSpec, encode_pair
from lm.row_files import check_disjoint, load_rows, row_name
from lm.run_folder import RunFolder, progress
from lm.shards import is_sharded
from unlearn.attacks.answers import ask, read_answers, write_answers
from unlearn.attacks.base import Attack, Attacked, AttackSettings, Trial
from unlearn.attacks.comparing import RETAIN, UNLEARNED, Curve, Done, audit_of, compare, curve_of
from unlearn.attacks.others import Others, others_of
from unlearn.attacks.relearning import Relearning
from unlearn.attacks.result import AttackResult
from unlearn.evaluation.lume import check_rows
from unlearn.generation.batching import Workers
from unlearn.scratch import scratch_run


def attack(
    model: LanguageModel | str,
    forget: Sequence[Row] | str,
    retain: Sequence[Row] | str = (),
    *,
    unseen: Sequence[Row] | str = (),
    retain_model: LanguageModel | str | None = None,
    method: Attack = Relearning(),  # noqa: B008 (frozen)
    seeds: Sequence[int] = (0, 1, 2),
    prompt: PromptSpec = PromptSpec(),  # noqa: B008
    max_new_tokens: int = 64,
    batch_size: int = 64,
    margin: float = 0.1,
    confidence: float = 0.95,
) -> AttackResult:
    """Try to bring the forgotten back, and say whether it came. No model that is given is changed; nothing is kept on disk.

    Args:
        model: the unlearned model, or what `lm.load` takes: a folder, a hub id.
        forget: the rows that it should have forgotten, or a source of them: a file, a folder, `builtin:forget`.
        retain: the rows that it kept, which an attacker may have; likewise.
        unseen: rows of people whom neither model saw, of the same tasks and kinds: they are asked too, and `residue` says whether
            the forgotten look like them. Empty: nobody else is asked.
        retain_model: one of the same shape that never saw the forget rows, attacked alike. Without it what the attack taught
            cannot be told from what was still inside: the curves are there, and every verdict is "cannot tell".
        method: what is done; `Relearning()` trains the model a little, on each of four kinds of rows.
        seeds: every trial is made once with each.
        prompt: how rows are rendered: as they were trained.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts generated at once on each process.
        margin: a mean difference of scores (0 to 1) below this counts as none.
        confidence: of the interval over people.

    Returns:
        a comparison for each kind of rows that the attacker may have: `verdict`, `excess` (mean, low, high), and the curves
        `unlearned` and `retain_model`, (rows, levels) scores from 0 to 1; the `worst` of all, and with unseen rows the `residue`.
        Printed, it is a table and a sentence for each.

    Raises:
        UserError: rows on both sides, rows that no score is defined for, nothing to give or to ask, models that differ in shape.

    Example:
        >>> import unlearn
        >>> from unlearn.attacks import Relearning
        >>> forget, retain = unlearn.load_rows("builtin:forget")[:12], unlearn.load_rows("builtin:retain")[:12]
        >>> few = Relearning(given=("retain",), steps=2, every=1, batch=4, micro_batch=4)
        >>> result = unlearn.attack(
        ...     "builtin", forget, retain, retain_model="builtin:retain_model", method=few, seeds=(0,), max_new_tokens=8
        ... )  # doctest: +ELLIPSIS
        == Relearning: retain, seed 0 ...
        >>> comparison = result.comparisons[0]
        >>> comparison.levels, comparison.unlearned.shape == comparison.retain_model.shape
        ((0, 1, 2), True)
    """
    forget = load_rows(forget) if isinstance(forget, str) else tuple(forget)
    retain = load_rows(retain) if isinstance(retain, str) else tuple(retain)
    unseen = load_rows(unseen) if isinstance(unseen, str) else tuple(unseen)
    check_disjoint(forget, retain)
    check_rows((*forget, *unseen))
    settings = AttackSettings(seeds=tuple(seeds), prompt=prompt, max_new_tokens=max_new_tokens, batch_size=batch_size)
    others = others_of(forget, retain, unseen)
    trials = [others.beside(trial) for trial in method.trials(forget, retain, settings)]
    cpu = not isinstance(model, str) and model.device.type == "cpu"
    acc = accelerator(cpu=cpu)
    models = {UNLEARNED: _loaded(acc, model)}
    if retain_model is not None:
        models[RETAIN] = _loaded(acc, retain_model)
    if RETAIN in models:
        require_alike(models[UNLEARNED], models[RETAIN], (*forget, *others.rows), prompt)
    subjects = {name: in_memory(each, cpu=cpu) for name, each in models.items()}
    with scratch_run(acc) as run:
        before = ask_before(acc, models, forget, others, settings, run)
        return attack_all(
            acc, subjects, before, trials, forget, others, method, settings, run, margin=margin, confidence=confidence
        )


def _loaded(acc: Accelerator, model: LanguageModel | str) -> LanguageModel:
    return load_here(acc, ModelSpec(path=model)) if isinstance(model, str) else model


def in_memory(model: LanguageModel, *, cpu: bool) -> Attacked:
    """A model that stays as it is: its copies are attacked."""
    if is_sharded(model.model):
        raise UserError(f"{model.name} is sharded, and an attack begins with a whole model: launch with DDP")
    return Attacked(lambda: replace(model, model=copy.deepcopy(model.model)), cpu=cpu)


def ask_before(
    acc: Accelerator,
    models: Mapping[str, LanguageModel],
    forget: Sequence[Row],
    others: Others,
    settings: AttackSettings,
    run: RunFolder,
) -> dict[str, Curve]:
    """What each model answers to all forget rows and to others' before it is attacked; what is in the run folder is read."""
    curves: dict[str, Curve] = {name: {} for name in models}
    asked = [("", tuple(forget)), ("-others", others.rows)]
    for (name, model), (suffix, rows) in product(models.items(), asked):
        if not rows:
            continue
        path = run.path / f"before-{name}{suffix}.json"
        if not path.exists():
            with progress(len(rows), label=f"before: {name}{suffix}", unit="rows", enabled=run.main) as advance:
                answers = ask(
                    model,
                    rows,
                    settings.prompt,
                    max_new_tokens=settings.max_new_tokens,
                    batch_size=settings.batch_size,
                    workers=Workers(acc.process_index, acc.num_processes),
                    progress=lambda done: advance(done * acc.num_processes),
                )
            if run.main:
                write_answers(path, answers)
            acc.wait_for_everyone()
        curves[name] |= {answer.id: [answer] for answer in read_answers(path)}
    return curves


def attack_all(
    acc: Accelerator,
    subjects: Mapping[str, Attacked],
    before: Mapping[str, Curve],
    trials: Sequence[Trial],
    forget: Sequence[Row],
    others: Others,
    attack: Attack,
    settings: AttackSettings,
    run: RunFolder,
    *,
    margin: float,
    confidence: float,
) -> AttackResult:
    """Every trial on every model, and for each name and variant that trials have the comparison. All processes call it.

    Args:
        subjects: `unlearned`, and `retain_model` if there is one.
        before: what each answered before.
        others: who is asked beside the forgotten, as the trials name them.
        run: where answers are kept, a folder for each trial and model; what is there already is not done again.
    """
    by_way: dict[tuple[str, str], list[Done]] = {}
    started = time.monotonic()
    for number, trial in enumerate(trials):
        rest = (time.monotonic() - started) / number * (len(trials) - number) if number else None
        left = "" if rest is None else f", about {rest:.0f} s left"
        way = f"{trial.name}, {trial.variant}" if trial.variant else trial.name
        acc.print(f"== {type(attack).__name__}: {way}, seed {trial.seed} ({number + 1} of {len(trials)}{left})")
        curves = {}
        for name, subject in subjects.items():
            folder = run.path / trial.folder / name
            later = attack.run(trial, subject, settings, folder)
            curves[name] = curve_of(trial, before[name], [later[level] for level in attack.levels[1:]])
        by_way.setdefault((trial.name, trial.variant), []).append(Done(trial, curves))
    comparisons, audits = [], []
    for done in by_way.values():
        comparisons.append(compare(attack, forget, done, margin=margin, confidence=confidence))
        audits.append(audit_of(comparisons[-1], forget, others, done, confidence=confidence))
    return AttackResult(attack, tuple(comparisons), tuple(audits))


def require_alike(one: LanguageModel, other: LanguageModel, rows: Sequence[Row], prompt: PromptSpec) -> None:
    """Raise UserError unless two models have one shape and cut rows into the same tokens."""
    sizes = [(each.anatomy.layers, each.anatomy.hidden, each.anatomy.vocabulary) for each in (one, other)]
    if sizes[0] != sizes[1]:
        shapes = [f"{layers} layers of width {hidden} and {tokens} tokens" for layers, hidden, tokens in sizes]
        raise UserError(
            f"{one.name} has {shapes[0]}, and the retain model {other.name} has {shapes[1]}: give retain_model.path "
            "one of the same shape"
        )
    for row in rows:
        cut = [encode_pair(each.tokenizer, row.input, row.output, prompt).ids for each in (one, other)]
        if cut[0] != cut[1]:
            raise UserError(
                f"{other.name} cuts row {row_name(row)} into other tokens than {one.name}: give it the same tokenizer"
            )
