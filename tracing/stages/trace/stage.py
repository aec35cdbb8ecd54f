"""The tracing stage from facts to files: trace, choose layers, draw, write. Wiring only."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lm.anatomy import Kind
from lm.devices import accelerator, launch_facts, load_here, together
from lm.errors import UserError
from lm.model import LanguageModel
from lm.run_folder import RunFolder, peak_memory_bytes, stage, write_atomic, write_json
from tracing.causal_tracing import trace
from tracing.corruption.noise import Corruption
from tracing.effects.agreement import Agreement
from tracing.effects.effects import Effects
from tracing.effects.interaction import Interaction, interaction
from tracing.effects.roles import Aggregation
from tracing.effects.table import EffectTable
from tracing.known import NothingToTrace
from tracing.plan.choose import choose_layers
from tracing.plan.cross_check import confirm
from tracing.plan.layer_plan import LayerPlan
from tracing.plan.sequential import trace_until_apart
from tracing.plots.heatmaps import figure, heatmap
from tracing.question.facts import Fact, drawn, facts_hash
from tracing.settings import TraceSettings, Workers
from tracing.stages.trace.config import TraceConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceResult:
    """What the stage made, as it is in the run folder."""

    effects: Effects
    plan: LayerPlan
    seconds: float
    others: Mapping[str, Effects] = field(default_factory=dict)
    """Those of the same facts under other corruptions, by name."""
    interaction: Interaction | None = None
    """Of windows: what they bring back beyond their layers one by one."""


@stage
def run_trace(config: TraceConfig, facts: Sequence[Fact] | None = None) -> TraceResult:
    """Trace as the config says.

    Writes into `config.out`: `plan.json` (what training consumes), `effects.npz` (every cell), `effects.json` (a summary in
    sentences, means and shares with intervals by token role, facts used and left out), `effects.png` (all kinds side by side)
    and one `KIND.png` a kind. Of the same facts, for each metric of `also_metrics` an `effects-METRIC.npz`, `.json` and `.png`,
    for each corruption of `also` an `effects-NAME.npz`, `.json` and `.png`, and for both `effects-NAME-METRIC`. Where windows of
    layers are restored, single layers are too: `effects-single.npz`, `.json` and `.png`, and `interaction.json`, what windows
    bring back beyond their layers.

    Raises:
        UserError: whatever the user can mend; finished facts stay in the run folder.
    """
    started = time.monotonic()
    facts = config.facts.read() if facts is None else facts
    most = config.facts.max_facts or (len(facts) if config.stop_when_apart else None)
    facts = drawn(facts, most, config.seed)
    acc = accelerator(cpu=config.model.device == "cpu")
    model = load_here(acc, config.model)
    size = config.plan.layers(model.anatomy.layers)
    if size is not None and size > model.anatomy.layers:
        raise UserError(f"plan.size is {size} but {model.name} has {model.anatomy.layers} layers: give fewer, or null")
    with together(acc):
        if acc.is_main_process:
            about = {"facts": {"count": len(facts), "sha256": facts_hash(facts)}, "devices": launch_facts(acc)}
            RunFolder.create(
                config.out, config, resume=config.resume, facts=about, same=("facts",), free=("memory", "texts")
            )
    run = RunFolder(config.out, main=acc.is_main_process)
    workers = Workers(acc.process_index, acc.num_processes, acc.wait_for_everyone)

    asking = _Asking(config=config, model=model, facts=facts, size=size, cache=run.path / "facts", workers=workers)
    if config.stop_when_apart and most is not None:
        stopped = trace_until_apart(asking.some, asking.plan, most, config.plan.confidence)
        effects, plan = stopped.effects, stopped.plan
    else:
        effects = asking.some(most)
        plan = asking.plan(effects, config.plan.confidence)
    others, lacking = asking.others(effects)
    if config.others:
        chosen = config.plan
        plan = confirm(
            plan, effects, others, lacking, roles=chosen.roles, aggregation=chosen.aggregation, seed=config.seed
        )
    beyond = asking.interaction(effects)
    if beyond is not None:
        plan = _with_interaction(plan, beyond, config)
    result = TraceResult(
        effects=effects, plan=plan, seconds=time.monotonic() - started, others=others, interaction=beyond
    )
    if acc.is_main_process:
        write_result(
            result,
            run.path,
            confidence=config.plan.confidence,
            seed=config.seed,
            aggregation=config.plan.aggregation,
            texts=config.texts,
        )
        before = run.manifest.get("seconds", 0.0)  # of earlier calls, if this one went on with their facts
        run.finish(seconds=before + result.seconds, peak_memory_bytes=peak_memory_bytes())
    acc.wait_for_everyone()
    return result


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asking:
    """A config with all that it needs to be carried out."""

    config: TraceConfig
    model: LanguageModel
    facts: Sequence[Fact]
    size: int | None
    cache: Path
    workers: Workers

    def some(self, max_facts: int | None) -> Effects:
        """The effects of up to so many known facts."""
        return self._trace(self.config.corruption, max_facts=max_facts, least_total=self.config.least_total)

    def others(self, effects: Effects) -> tuple[dict[str, Effects], dict[str, str]]:
        """The effects of the same facts under every other corruption, by name; and why one has none."""
        traced: dict[str, Effects] = {}
        lacking: dict[str, str] = {}
        for name, corruption in self.config.others.items():
            try:
                traced[name] = self._trace(corruption, only=effects.facts)
            except NothingToTrace as error:  # no reason to lose what was traced
                lacking[name] = str(error)
        return traced, lacking

    def interaction(self, effects: Effects) -> Interaction | None:
        """Single layers of the same facts beside windows of them; None where there are no windows."""
        kinds = tuple(kind for kind in effects.kinds if kind != "resid")
        if self.config.window == 1 or not kinds:
            return None
        single = self._trace(self.config.corruption, only=effects.facts, window=1, kinds=kinds)
        return interaction(effects, single)

    def plan(self, effects: Effects, confidence: float) -> LayerPlan:
        """The plan that the effects give at a confidence."""
        plan = self.config.plan
        return choose_layers(
            effects,
            size=self.size,
            rule=plan.rule,
            share=plan.share,
            kind=plan.kind,
            roles=plan.roles,
            seed=self.config.seed,
            confidence=confidence,
            stability=plan.stability,
            least_share=plan.least_share,
            aggregation=plan.aggregation,
        )

    def _trace(
        self,
        corruption: Corruption,
        *,
        max_facts: int | None = None,
        least_total: float | None = None,
        only: Sequence[Fact] | None = None,
        window: int | None = None,
        kinds: Sequence[Kind] | None = None,
    ) -> Effects:
        config = self.config
        settings = TraceSettings(
            corruption=corruption,
            kinds=config.kinds if kinds is None else kinds,
            window=config.window if window is None else window,
            metric=config.metric,
            also_metrics=config.also_metrics,
            engine=config.engine,
            prompt=config.prompt,
            positions=config.positions,
            sever=config.sever,
            memory=config.memory,
            max_facts=max_facts,
            seed=None,  # they are drawn
            least_total=least_total,
            only=only,
            cache=self.cache,
            workers=self.workers,
        )
        return trace(self.model, self.facts, settings)


def describe(config: TraceConfig, result: TraceResult) -> str:
    """What the command prints at the end: every trace in sentences, how far traces agree, and the plan's verdict."""
    effects, plan = result.effects, result.plan
    lines = [
        f"traced {len(effects.facts)} facts, left out {len(effects.skipped)} (reasons in {config.out}/effects.json)"
    ]
    first = type(config.corruption).__name__
    for name, traced in {first: effects, **result.others}.items():
        for read in (traced, *traced.also.values()):
            lines.append(f"{name}: {read.summary(confidence=config.plan.confidence, seed=config.seed)}")
    for name, compared in plan.evidence.get("also", {}).items():
        for alike in compared.get("agreement", {}).values():
            lines.append(f"{first} and {name}, {Agreement(**alike)}")
    lines += plan.evidence.get("windows", ())
    layers = f"layers {list(plan.layers)} of {effects.layers}, {' and '.join(plan.modules)}"
    return "\n".join([*lines, plan.verdict, f"wrote {config.out}/plan.json: {layers}"])


def write_result(
    result: TraceResult,
    folder: Path,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    aggregation: Aggregation = "fixed",
    texts: bool = False,
) -> None:
    """Everything but the run's own records; `texts`: with what the facts say, which is what is to be forgotten."""
    effects, plan = result.effects, result.plan
    tables = [effects.table(kind, confidence=confidence, seed=seed, aggregation=aggregation) for kind in effects.kinds]
    effects.save(folder / "effects.npz")
    write_json(folder / "effects.json", readable(effects, tables, seed=seed, texts=texts), private=True)
    kinds = ("mlp", "attn") if plan.evidence["kind"] == "both" else (plan.evidence["kind"],)
    tentative = not plan.singled_out
    write_atomic(folder / "effects.png", figure(tables, band=plan.layers, band_kinds=kinds, tentative=tentative))
    beside: dict[str, Effects] = dict(effects.also)
    for name, other in result.others.items():
        beside |= {name: other, **{f"{name}-{metric}": by_metric for metric, by_metric in other.also.items()}}
    if result.interaction is not None:
        beside["single"] = result.interaction.single
        beyond = result.interaction.to_json(plan.evidence["roles"], confidence=confidence, seed=seed)
        write_json(folder / "interaction.json", beyond)
    for name, other in beside.items():
        theirs = [other.table(kind, confidence=confidence, seed=seed, aggregation=aggregation) for kind in other.kinds]
        other.save(folder / f"effects-{name}.npz")
        write_json(folder / f"effects-{name}.json", readable(other, theirs, seed=seed, texts=texts), private=True)
        drawing = figure(theirs, band=plan.layers, band_kinds=kinds, tentative=tentative)
        write_atomic(folder / f"effects-{name}.png", drawing)
    for table in tables:
        band = plan.layers if table.kind in kinds else ()
        heatmap(table, folder / f"{table.kind}.png", band=band, tentative=tentative)
    plan.save(folder / "plan.json")  # last: a plan means that the stage ended well


def _with_interaction(plan: LayerPlan, beyond: Interaction, config: TraceConfig) -> LayerPlan:
    """The plan with what windows bring back beyond their layers among its caveats."""
    chosen = config.plan
    sentences = [
        beyond.sentence(kind, roles=chosen.roles, confidence=chosen.confidence, seed=config.seed)
        for kind in beyond.kinds
    ]
    evidence = {**plan.evidence, "windows": sentences, "caveats": [*plan.evidence["caveats"], *sentences]}
    return replace(plan, evidence=evidence)


_COLUMNS = ("mean", "low", "high", "share", "share_low", "share_high")


def readable(effects: Effects, tables: Sequence[EffectTable], *, seed: int = 0, texts: bool = False) -> dict[str, Any]:
    """The means as plain data: a summary in sentences, scores a fact, what was left out, and a table a kind.

    `texts`: facts with all that they say, which is what is to be forgotten; else with their ids alone.
    """

    def shown(fact: Fact) -> dict[str, Any]:
        return asdict(fact) if texts else {"id": fact.id}

    return {
        "summary": effects.summary(confidence=tables[0].confidence, seed=seed).split("\n"),
        "metric": effects.metric,
        "window": effects.window,
        "layers_restored": {table.kind: table.layers_restored.tolist() for table in tables},
        "sigma": effects.sigma,
        "clean_mean": float(effects.clean.mean()),
        "corrupted_mean": float(effects.corrupted.mean()),
        "total_effect_mean": float(effects.total.mean()),
        "facts": [
            {**shown(fact), "clean": float(clean), "corrupted": float(corrupted)}
            for fact, clean, corrupted in zip(effects.facts, effects.clean, effects.corrupted, strict=True)
        ],
        "left_out": [{**shown(skip.fact), "reason": skip.reason if texts else skip.why} for skip in effects.skipped],
        "tables": readable_tables(tables),
        "provenance": dict(effects.provenance),
    }


def readable_tables(tables: Sequence[EffectTable]) -> dict[str, Any]:
    """kind -> token role -> facts, and by layer mean and share of the total effect with intervals; null where no fact has the
    role (shares also where the corruption took nothing). Of windows also the mean per layer restored."""
    return {
        table.kind: {
            role: {
                "facts": int(table.facts[row]),
                **{name: _numbers(getattr(table, name)[row]) for name in _COLUMNS},
                **({"per_layer": _numbers(table.per_layer[row])} if table.window > 1 else {}),
            }
            for row, role in enumerate(table.roles)
        }
        for table in tables
    }


def _numbers(values: Any) -> list[float] | None:
    return None if np.isnan(values).any() else [float(value) for value in values]
