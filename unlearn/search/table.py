"""The page of a search, in Markdown: on what terms, the table, every trial, and the commands that make its rows again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from unlearn.search.choice import Estimate
from unlearn.search.config import SearchConfig, Value
from unlearn.search.plan import SCORES
from unlearn.search.result import MethodResult, SearchResult
from unlearn.search.scored import Finished, Scored

_QUALITY = {
    "forget_terms": "the mean of the forget terms (1 - recall of completions, 1 - exact match of answers)",
    "task_aggregate": "the task aggregate, the harmonic mean of all forget and retain terms",
}
_KEEPING = {"utility": "accuracy on the utility questions", "retain_terms": "the mean of the retain terms"}
_DRAWN = {
    "random": "drawn at random",
    "grid": "every combination of its choices",
    "tpe": "proposed by tree-structured Parzen estimators",
}


def page(result: SearchResult) -> str:
    """The whole page."""
    parts = ["# Which method is better at the same effort", terms(result), table(result), *_left_out(result)]
    parts += ["## Every trial", every_trial(result)]
    parts += ["## The same runs again", commands(result)]
    return "\n\n".join(part for part in parts if part) + "\n"


def terms(result: SearchResult) -> str:
    """On what terms the methods were compared."""
    config = result.config
    drawn = _DRAWN[config.sampler] + (
        f" (the first {config.startup} at random)" if config.sampler == "tpe" and config.startup < config.trials else ""
    )
    if config.sampler == "tpe" and config.startup >= config.trials:
        drawn = _DRAWN["random"]
    trials = [trial for method in result.methods for trial in method.trials]
    failed = sum(trial.failed is not None for trial in trials)
    again = "" if config.repeat is None else f" of the {config.repeat} methods that came out best"
    lines = [
        f"- Every method had {config.trials} trials, {drawn}, sampler seed {config.seed}; {failed} of all {len(trials)} failed.",
        f"- Quality is {_QUALITY[config.quality]}; utility is {_KEEPING[config.keeping]}. Higher is better in both.",
        f"- Budget: {config.budget:.0%} of the base model's utility of {result.base.utility:.3f}. A trial counts if its utility "
        f"is at least {result.lowest:.3f}; the best trial is that of the highest quality among these.",
        f"- The best trial{again} was run again with seeds {', '.join(map(str, config.seeds))}, none of which it was chosen on. "
        "The table shows these runs: mean ± half of the 95 % Student interval over seeds (smallest to largest).",
        f"- The base model: quality {result.base.quality:.3f}."
        + (
            f" The retain model, which never saw the forget rows: quality {result.retain_model.quality:.3f}, "
            f"utility {result.retain_model.utility:.3f}."
            if result.retain_model is not None
            else ""
        ),
    ]
    return "\n".join(lines)


def table(result: SearchResult) -> str:
    """A row a method: those that stand by quality, then those whose repeats do not keep to the budget."""
    ranked = result.ranked
    others = [method for method in result.methods if method not in ranked and method.scored_repeats]
    head = ["", "method", "quality", "utility", "of base", "task aggregate", "seeds within budget"]
    head += ["training, s", "tokens", "peak memory, MB", "settings"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in (*ranked, *others):
        place = str(ranked.index(method) + 1) if method in ranked else "–"
        lines.append("| " + " | ".join([place, *_row(method, result)]) + " |")
    return "\n".join(lines)


def _row(method: MethodResult, result: SearchResult) -> list[str]:
    assert method.best is not None
    done = method.scored_repeats
    within = sum(run.utility >= result.lowest for run in done)
    share = Estimate.of([run.utility / result.base.utility for run in done])
    return [
        method.name,
        shown(method.estimate("quality")),
        shown(method.estimate("utility")),
        shown(share),
        shown(method.estimate("task_aggregate")),
        f"{within} of {len(method.repeats)}",
        f"{method.estimate('seconds').mean:.1f}",
        f"{method.estimate('tokens').mean:,.0f}",
        f"{max(run.peak_bytes for run in done) / 1e6:,.0f}",
        settings(method.trials[method.best].params),
    ]


def _left_out(result: SearchResult) -> list[str]:
    lines = []
    for method in result.methods:
        for seed, run in method.repeats.items():
            if run.failed is not None:
                lines.append(f"{method.name} has no place: with seed {seed} it failed ({run.failed}).")
        if method.best is None:
            lines.append(f"{method.name} has no row: {_why_not(method.trials, result)}")
        elif not method.repeats:
            lines.append(
                f"{method.name} was not run again: its best trial is not among the first {result.config.repeat}."
            )
    return lines


def _why_not(trials: Sequence[Finished], result: SearchResult) -> str:
    done = [trial.scored for trial in trials if trial.scored is not None]
    if not done:
        return f"all {len(trials)} trials failed."
    nearest = max(done, key=lambda run: run.utility)
    return (
        f"none of its {len(trials)} trials is within the budget ({len(trials) - len(done)} failed); the nearest, "
        f"{nearest.folder}, has utility {nearest.utility:.3f}."
    )


def every_trial(result: SearchResult) -> str:
    """A row a trial."""
    head = ["trial", "settings", "quality", "utility", "within budget", "training, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method in result.methods:
        for number, trial in enumerate(method.trials):
            name = f"{method.name} {number}" + (" (best)" if number == method.best else "")
            lines.append("| " + " | ".join([name, settings(trial.params), *_trial(trial, result.lowest)]) + " |")
    return "\n".join(lines)


def _trial(trial: Finished, lowest: float) -> list[str]:
    if trial.scored is None:
        return ["–", "–", f"failed: {trial.failed}", "–"]
    within = "yes" if trial.scored.utility >= lowest else "no"
    return [f"{trial.scored.quality:.3f}", f"{trial.scored.utility:.3f}", within, f"{trial.scored.seconds:.1f}"]


def commands(result: SearchResult) -> str:
    """What to type to make the table's rows again."""
    lines = ["A trial is made again likewise, with its folder (`NAME/trial-00`) in the place of a repeat's.", ""]
    for method in result.methods:
        lines += [f"    # {method.name}"] if method.scored_repeats else []
        for run in method.scored_repeats:
            lines += [f"    {command}" for command in commands_of(result.config, run)]
    return "\n".join(lines) if len(lines) > 2 else "No method has a row."


def commands_of(config: SearchConfig, run: Scored) -> tuple[str, str]:
    """The two commands of one run: train it, score it."""
    folder, new = f"{config.out}/{run.folder}", f"runs/again/{run.folder}"
    return (
        f"palimpsest unlearn --config {folder}/config.yaml --out {new}",
        f"palimpsest evaluate --config {folder}/{SCORES}/config.yaml --model.path {new}/model --out {new}/{SCORES}",
    )


def shown(estimate: Estimate) -> str:
    """`mean ± half (smallest to largest)`, or the mean alone of one seed."""
    mean = f"{estimate.mean:.3f}"
    if math.isnan(estimate.half):
        return mean
    return f"{mean} ± {estimate.half:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def settings(params: Mapping[str, Value]) -> str:
    """The values that were tried, each under the last part of its name."""
    parts = [
        f"{name.rsplit('.', 1)[-1]} {value:.3g}" if isinstance(value, float) else f"{name.rsplit('.', 1)[-1]} {value}"
        for name, value in params.items()
    ]
    return ", ".join(parts)
