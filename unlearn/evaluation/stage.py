"""The evaluation stage from files to files: read what is asked, load the model, ask, write scores and every answer.

This is wiring; the measuring is `unlearn.evaluation.evaluate`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict

from lm.data.rows import Question
from lm.devices import accelerator, launch_facts, load_here, together
from lm.model import fingerprint
from lm.row_files import data_hash, load_calibration, load_documents, load_questions, load_rows
from lm.run_folder import RunFolder, peak_memory_bytes, stage, write_json
from unlearn.evaluation.config import LM_EVAL, EvaluateConfig
from unlearn.evaluation.evaluate import evaluate
from unlearn.evaluation.evaluation_set import EvaluationSet, digest
from unlearn.evaluation.lm_eval_harness import BUILTIN_TASK
from unlearn.evaluation.lume import SCORES, SIDES, TASKS
from unlearn.evaluation.result import Evaluation, finished_losses
from unlearn.evaluation.scores import known_scores
from unlearn.generation.batching import Workers

_ROWS = (
    ("task aggregate", "task_aggregate"),
    ("membership", "mia_score"),
    ("utility", "utility"),
    ("final", "final"),
)


@stage
def run_evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate as the config says; writes `scores.json`, `examples.json` (the scores example by example),
    `forget.jsonl`, `retain.jsonl` and other parts into `config.out`.

    Raises:
        UserError: whatever the user can mend, before the model is loaded wherever that is possible.
    """
    evaluation_set = read_set(config)
    evaluation_set.check_harness(evaluation_set.askable(config.scores))  # before there is a folder
    acc = accelerator(cpu=config.model.device == "cpu")
    model = load_here(acc, config.model)
    untouched = None
    if config.untouched is not None:
        untouched = model if config.untouched == config.model else load_here(acc, config.untouched)
    with together(acc):
        if acc.is_main_process:
            facts = {
                "data": {
                    "forget": data_hash(evaluation_set.forget),
                    "retain": data_hash(evaluation_set.retain),
                    "documents": evaluation_set.documents,
                    "questions": digest([asdict(question) for question in evaluation_set.questions]),
                },
                "weights": fingerprint(model),
                "devices": launch_facts(acc),
            }
            if evaluation_set.retain_losses is not None:
                facts["retain_losses"] = digest(asdict(evaluation_set.retain_losses))
            if untouched is not None:
                facts["untouched"] = fingerprint(untouched)
            same = ("data", "weights", "retain_losses", "untouched")
            RunFolder.create(config.out, config, resume=config.resume, facts=facts, same=same)
    run = RunFolder(config.out, main=acc.is_main_process)
    result = evaluate(
        model,
        evaluation_set.forget,
        evaluation_set.retain,
        members=evaluation_set.members,
        nonmembers=evaluation_set.nonmembers,
        questions=evaluation_set.questions,
        style=evaluation_set.style,
        lm_eval=evaluation_set.lm_eval,
        retain_scores=evaluation_set.retain_losses,
        untouched=untouched,
        general=evaluation_set.general,
        words=evaluation_set.words,
        scores=config.scores,
        prompt=config.prompt,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        store=run.path,
        workers=Workers(acc.process_index, acc.num_processes),
        show=True,
    )
    if acc.is_main_process:
        write_json(run.path / "scores.json", {"model": config.model.path, **result.to_json()})
        write_json(run.path / "examples.json", result.examples)
        run.finish(seconds=dict(result.seconds), peak_memory_bytes=peak_memory_bytes())
    acc.wait_for_everyone()
    return result


def read_set(config: EvaluateConfig) -> EvaluationSet:
    """Everything the config names, read and checked; no model is touched."""
    lm_eval = config.utility.removeprefix(LM_EVAL) if config.utility and config.utility.startswith(LM_EVAL) else None
    questions: tuple[Question, ...] = ()
    if lm_eval == BUILTIN_TASK:
        questions = load_questions("builtin:utility")
    elif config.utility is not None and lm_eval is None:
        questions = first_of_each_subject(load_questions(config.utility), config.utility_per_subject)
    used = () if config.calibration is None else load_calibration(config.calibration, columns=config.columns)
    members, nonmembers = (
        ()
        if source is None
        else load_documents(source, task=config.membership_task, columns=config.columns, without=unseen)
        for source, unseen in ((config.members, ()), (config.nonmembers, used))
    )
    forget, retain = (load_rows(source, columns=config.columns) for source in (config.forget, config.retain))
    evaluation_set = EvaluationSet(
        forget=forget,
        retain=retain,
        members=members,
        nonmembers=nonmembers,
        questions=questions,
        style=config.utility_style,
        lm_eval=lm_eval,
        retain_losses=None if config.retain_scores is None else finished_losses(config.retain_scores),
        untouched=config.untouched is not None,
        general=config.general_text,
        words=config.words,
    )
    evaluation_set.askable(config.scores)
    return evaluation_set


def first_of_each_subject(questions: tuple[Question, ...], count: int | None) -> tuple[Question, ...]:
    """The first `count` questions of each subject, in their order; all of them if `count` is None."""
    if count is None:
        return questions
    seen: Counter[str] = Counter()
    kept = []
    for question in questions:
        seen[question.subject] += 1
        if seen[question.subject] <= count:
            kept.append(question)
    return tuple(kept)


def describe(config: EvaluateConfig, result: Evaluation) -> str:
    """What the command prints at the end: the scores, and where they were written."""
    return f"{table(result)}\nwrote {config.out}/scores.json"


def table(result: Evaluation) -> str:
    """The scores as a few lines of text: a row a side and task, then the aggregates, then the others."""
    lines = []
    if any(result.scores.applies):
        lines.append(f"{'':<16}{SCORES[0]:>14}{SCORES[1]:>12}   (forget: 1 - value; higher is better everywhere)")
        terms = list(result.scores.terms)
        for place, (side, task) in enumerate((side, task) for side in SIDES for task in TASKS):
            first, second = terms[2 * place : 2 * place + 2]
            lines.append(f"{side + ' ' + task:<16}{_number(first):>14}{_number(second):>12}")
    auc = result.values.get("mia_auc")
    for name, key in _ROWS:
        extra = f"   (AUC {auc:.4f})" if name == "membership" and auc is not None else ""
        lines.append(f"{name:<16}{_number(result.values.get(key)):>14}{extra}")
    choices = result.statistics.choices
    if choices is not None and choices.truncated:
        longer = f"{choices.truncated} of {len(choices.right)} questions were longer than the model reads"
        lines.append(f"{longer} and lost their beginning")
    return "\n".join([*lines, *_further(result)])


def _further(result: Evaluation) -> list[str]:
    """The other scores: a line each, those of a group on one line."""
    scores, lines = known_scores(), []
    groups: dict[str, list[str]] = {}
    for name in result.others:
        value, score = result.values[name], scores.get(name)
        if score is None or value is None or not score.group:
            lines.append(f"{name.replace('_', ' '):<16} {_number(value):>13}")
        else:
            groups.setdefault(score.group, []).append(f"{score.title} {score.text(value)}")
    width = max((len(group) for group in groups), default=0)
    return [*lines, *(f"{group:<{width}}  {', '.join(values)}" for group, values in groups.items())]


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
