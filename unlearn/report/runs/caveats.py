"""What the numbers of a report do not show, and what they were made with: sentences and facts that follow from the runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from unlearn.report.records import Report, ReportModel
from unlearn.report.runs.folders import Run
from unlearn.report.runs.models import Subject
from unlearn.report.verdict import focus

_SETTINGS = ("prompt", "max_new_tokens", "utility_style", "utility_per_subject", "membership_task")


def left_out_sentences(report: Report) -> list[str]:
    """Which run folders a report does not show: a sentence, or none if it shows all."""
    names = ", ".join(report.left_out)
    return [f"Left out, for the run has not ended or its stage has no part on this page: {names}."] if names else []


def caveats(report: Report, evaluations: Mapping[str, Run]) -> tuple[str, ...]:
    """The sentences that hold for this report."""
    sentences = [*asked_alike(evaluations), *left_out_sentences(report)]
    if report.tables or report.plan is not None:
        sentences.append(
            "Tracing shows where an answer is carried, not where training works best: controls, the same method in other layers, "
            "are the test of the choice."
        )
    if any(not math.isnan(model.mia_auc) for model in report.models):
        sentences.append(
            "The membership score looks at whole documents, prompt and answer: a model that was trained to forget answers alone "
            "can answer nothing and still know a document's beginning."
        )
    if not report.only("retain_model"):
        sentences.append(
            "No retain model is in this report: how well a model that never saw the forget rows would score is not known."
        )
    if report.methods:
        sentences.append("Each model is a single run: small differences between models may be chance.")
    if not report.attacks:
        sentences.append("Nothing on this page attacks the result: whether it comes back by relearning was not tried.")
    return tuple(sentences)


def facts_about(report: Report, entries: Sequence[tuple[Subject, ReportModel]], runs: Sequence[Run]) -> dict[str, str]:
    """With what the model that the page is about was made, or else the first run: versions, seeds, hashes, machine."""
    about = focus(report)
    made = next((subject for subject, model in entries if about is not None and model.key == about.key), None)
    run = next((run for run in ((made.unlearning, made.evaluation) if made is not None else ()) if run), runs[0])
    manifest, versions = run.manifest, run.manifest.get("versions") or {}
    data, devices = manifest.get("data") or {}, manifest.get("devices") or {}
    facts = {
        "date": manifest.get("finished"),
        "commit": manifest.get("git"),
        "python": manifest.get("python"),
        "torch": versions.get("torch"),
        "transformers": versions.get("transformers"),
        "seed of the batches": manifest.get("seed"),
        "forget rows (sha256)": data.get("forget"),
        "retain rows (sha256)": data.get("retain"),
    }
    if devices:
        machine = f"{manifest.get('platform')}, {devices.get('processes')} process"
        facts["machine"] = f"{machine}, {devices.get('threads')} threads"
    return {name: str(value) for name, value in facts.items() if value is not None}


def asked_alike(evaluations: Mapping[str, Run]) -> list[str]:
    """Whether all models were asked the same, in the same way."""
    runs = list(evaluations.values())
    sentences = []
    if len({str(run.manifest.get("data")) for run in runs}) > 1:
        sentences.append(
            "Not all models were asked the same rows, documents and questions: their scores do not compare one to one."
        )
    differing = [name for name in _SETTINGS if len({str(run.config.get(name)) for run in runs}) > 1]
    if differing:
        sentences.append(f"The evaluations differ in {', '.join(differing)}: their scores do not compare one to one.")
    return sentences
