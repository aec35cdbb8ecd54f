"""From the demo's run folders to its report: what its models are called, which caveats hold, what to type."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from unlearn.demo.entries import Entry
from unlearn.report import Report
from unlearn.report.runs.collect import Naming, collect

QUESTION = (
    "A small language model has memorized invented stories, people's personal data and biographies. "
    "Half of them must be forgotten, the other half kept. Where are they stored, can they be taken out there, "
    "and what is left of them afterwards?"
)
CAVEATS = (
    "The model is tiny and the world is invented: numbers here show that the method and the measuring work, not how a "
    "large model will behave.",
    "Tracing shows where an answer is carried, not where training works best. The controls are the test of the choice.",
    "The membership score looks at whole documents, prompt and answer; the joint method and its controls are trained to forget "
    "answers only, so a model can answer nothing and still know a document's beginning.",
    "These facts were learned in one short training, from rows in the form that is asked, as fine-tuning would teach them. "
    "What was fine-tuned in is far easier to remove than what was picked up in pretraining (arXiv 2602.19612), so this page "
    "flatters every method on it.",
    "Each method ran once here, with one seed; benchmarks/compare_methods.py repeats it over seeds and prints the spread.",
)
ATTACKED = (
    "The attack is a short one: one rate, one draw of rows, asked once. palimpsest attack --config grid tries more; other "
    "prompts, paraphrases and quantization are not tried here."
)
NOT_ATTACKED = "Nothing on this page attacks the result: whether it comes back by relearning was not tried."


def demo_report(out: Path, entries: Sequence[Entry], *, attacked: bool) -> Report:
    """The report of a finished demo in `out`, its models in the order of the entries, with the attacks where there are any."""
    evaluations = {entry.key: out / "scores" / entry.key for entry in entries}
    folders = [out / "trace", *evaluations.values(), *(out / entry.key for entry in entries if entry.path is None)]
    folders += [out / "attacks" / entry.key for entry in entries if attacked and entry.attacked]
    report = collect(
        [*folders, out / "retrace"],
        names={
            str(evaluations[entry.key]): Naming(key=entry.key, label=entry.label, note=entry.note, part=entry.part)
            for entry in entries
        },
    )
    return replace(
        report,
        question=QUESTION,
        model_name="the built-in model",
        caveats=(*CAVEATS, ATTACKED if attacked else NOT_ATTACKED),
        commands=(
            shlex.join(["palimpsest", "demo", "--config", str(out / "demo.yaml"), "--out", "runs/again"]),
            "make demo  # the same with the shipped settings, in a checkout",
        ),
    )
