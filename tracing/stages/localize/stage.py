"""The localizing stage from facts to files: every localizer, how far they agree, a plan, a picture. Wiring only."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lm.devices import accelerator, launch_facts, load_here, together
from lm.errors import NotWritten, UserError
from lm.model import LanguageModel
from lm.run_folder import RunFolder, peak_memory_bytes, stage, write_atomic, write_json
from tracing.effects.layer_scores import LayerScores
from tracing.known import known_facts
from tracing.localizers.base import Localization
from tracing.plan.combined import Agreements, combined_plan, compare_all
from tracing.plan.layer_plan import LayerPlan
from tracing.plan.verdict import verdict_without
from tracing.plots.pictures import plot_localizers
from tracing.question.facts import Fact, drawn, facts_hash
from tracing.stages.localize.config import LocalizeConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalizeResult:
    """What the stage made, as it is in the run folder."""

    scores: dict[str, LayerScores]
    agreements: Agreements
    plan: LayerPlan
    seconds: float
    refused: Mapping[str, str] = field(default_factory=dict)
    """The localizers that gave no scores, which the others were compared without, and why."""


@stage
def run_localize(
    config: LocalizeConfig, facts: Sequence[Fact] | None = None, retain: Sequence[Fact] = ()
) -> LocalizeResult:
    """Localize as the config says, every localizer on the same facts.

    Writes into `config.out`: `NAME.npz` a localizer (scores a fact, details), `agreement.json` and `agreement.md` (every pair,
    with intervals), `localizers.png`, and `plan.json` (what training consumes); which facts were left out is in `manifest.json`.
    Several processes share the localizers. One that refuses (these facts, this model) leaves `NAME.refused.json` with the reason;
    the others are compared without it, and a resumed run asks it again.

    Args:
        config: the whole comparison.
        facts: facts in memory; None reads those that the config names, and what must stay as well.
        retain: facts in memory that must stay, beside `facts`.

    Raises:
        UserError: whatever the user can mend, fewer than two localizers that do not refuse among it; finished ones stay in the
            run folder.
    """
    started = time.monotonic()
    if facts is None:
        facts, retain = config.facts.read(), config.facts.read(config.retain)
    acc = accelerator(cpu=config.model.device == "cpu")
    model = load_here(acc, config.model)
    size = config.plan.layers(model.anatomy.layers)
    if size > model.anatomy.layers:
        raise UserError(f"plan.size is {size} but {model.name} has {model.anatomy.layers} layers: give fewer, or null")
    with together(acc):
        if acc.is_main_process:
            about = {
                side: {"count": len(of_side), "sha256": facts_hash(of_side)}
                for side, of_side in (("facts", facts), ("retain", retain))
            }
            more = {**about, "devices": launch_facts(acc)}
            RunFolder.create(config.out, config, resume=config.resume, facts=more, same=tuple(about))
    run = RunFolder(config.out, main=acc.is_main_process)
    known, left_out = known_of(model, facts, config)
    kept, unkept = known_of(model, retain, config) if retain else ([], {})
    localization = Localization(
        model=model,
        facts=known,
        retain=kept,
        others=facts,
        prompt=config.prompt,
        cache=run.path / "facts",
        progress=acc.is_main_process,
    )
    for name in list(config.localizers)[acc.process_index :: acc.num_processes]:
        path = run.path / f"{name}.npz"
        if not path.exists():
            refused_path = refusal(run.path, name)
            try:
                layer_scores = config.localizers[name].locate(localization)
            except NotWritten:
                raise
            except UserError as error:
                write_json(refused_path, {"localizer": name, "reason": str(error)})
            else:
                layer_scores.save(path)
                refused_path.unlink(missing_ok=True)
    acc.wait_for_everyone()
    refused = {
        name: str(json.loads(refusal(run.path, name).read_text())["reason"])
        for name in config.localizers
        if refusal(run.path, name).exists() and not (run.path / f"{name}.npz").exists()
    }
    scores = {name: LayerScores.load(run.path / f"{name}.npz") for name in config.localizers if name not in refused}
    if len(scores) < 2:
        left = f"only {next(iter(scores))} is" if scores else "none is"
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise UserError(
            f"of {len(config.localizers)} localizers {left} left, so nothing is compared or planned ({reasons}): "
            "choose others, or give other facts"
        )
    agreements = compare_all(scores, confidence=config.plan.confidence, seed=config.seed)
    plan = combined_plan(
        scores,
        agreements,
        size=size,
        kind=config.plan.kind,
        seed=config.seed,
        confidence=config.plan.confidence,
        stability=config.plan.stability,
    )
    if refused:
        plan = replace(
            plan, verdict=verdict_without(plan, list(refused)), evidence={**plan.evidence, "refused": refused}
        )
    result = LocalizeResult(
        scores=scores, agreements=agreements, plan=plan, seconds=time.monotonic() - started, refused=refused
    )
    if acc.is_main_process:
        write_result(result, run.path, confidence=config.plan.confidence, seed=config.seed)
        before = run.manifest.get("seconds", 0.0)  # of earlier calls, if this one went on with their localizers
        run.finish(
            left_out={"facts": left_out, "retain": unkept},
            refused=refused,
            seconds=before + result.seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )
    acc.wait_for_everyone()
    return result


def describe(config: LocalizeConfig, result: LocalizeResult) -> str:
    """What the command prints at the end: each localizer in a line, the table of agreements, and the plan's verdict."""
    lines = []
    for name, scores in result.scores.items():
        first = ", ".join(f"{kind} highest at layer {scores.mean(kind).argmax()}" for kind in config.plan.kinds)
        lines.append(f"{name}: {scores.source}; {scores.unit}; {len(scores.facts)} facts; {first}")
        if checked := scores.details.get("verification"):
            lines.append(f"  {checked['sentence']}")
    lines += [f"{name}: no scores, compared without it: {reason}" for name, reason in result.refused.items()]
    lines += [f"\n{result.agreements.to_markdown()}", result.plan.verdict]
    return "\n".join([*lines, f"wrote {config.out}/plan.json and localizers.png"])


def refusal(folder: Path, name: str) -> Path:
    """Where it is written why a localizer gave no scores."""
    return folder / f"{name}.refused.json"


def known_of(model: LanguageModel, facts: Sequence[Fact], config: LocalizeConfig) -> tuple[list[Fact], dict[str, str]]:
    """The facts that the model knows, up to `max_facts` of them, drawn with the seed; and why each other one is left out."""
    known, skipped = known_facts(
        model, drawn(facts, config.facts.max_facts, config.seed), config.prompt, max_facts=config.facts.max_facts
    )
    return [encoded.fact for encoded in known], {skip.fact.label: skip.why for skip in skipped}


def write_result(result: LocalizeResult, folder: Path, *, confidence: float = 0.95, seed: int = 0) -> None:
    """Everything but the scores and the run's own records."""
    write_json(folder / "agreement.json", {**result.agreements.to_json(), "refused": dict(result.refused)})
    without = "".join(f"\n{name} gave no scores: {reason}\n" for name, reason in result.refused.items())
    write_atomic(folder / "agreement.md", result.agreements.to_markdown() + without)
    picture = plot_localizers(result.scores, result.agreements, result.plan, confidence=confidence, seed=seed)
    picture.save(folder / "localizers.png")
    result.plan.save(folder / "plan.json")  # last: a plan means that the stage ended well
