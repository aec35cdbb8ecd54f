"""The tracing stage from facts to files: trace, choose layers, draw, write. Wiring only.

Where facts are read from is the script's business (rows are read by `unlearn.data`, which stands above this package).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.devices import accelerator, launch_facts, together
from lm.errors import UserError
from lm.load import load
from lm.run import RunFolder, peak_memory_bytes, write_atomic, write_json
from tracing.choose import choose_layers
from tracing.config import TraceConfig
from tracing.effects import Aggregation, Effects, EffectTable
from tracing.facts import Fact
from tracing.plan import LayerPlan
from tracing.plots import figure, heatmap
from tracing.tracer import Workers, trace


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceResult:
    """What the stage made, as it is in the run folder."""

    effects: Effects
    plan: LayerPlan
    seconds: float


def run_tracing(config: TraceConfig, facts: Sequence[Fact]) -> TraceResult:
    """Trace as the config says.

    Writes into `config.out`: `plan.json` (what training consumes), `effects.npz` (every cell), `effects.json` (means and
    intervals by token role, facts used and left out), `effects.png` (all kinds side by side) and one `KIND.png` a kind.

    Raises:
        UserError: whatever the user can mend; finished facts stay in the run folder.
    """
    started = time.monotonic()
    facts = drawn(facts, config.max_facts, config.seed)
    acc = accelerator(cpu=config.model.device == "cpu")
    several = acc.num_processes > 1  # then each has its own device, and a name in the config would put all on one
    model = load(config.model, device=str(acc.device) if several else config.model.device or str(acc.device))
    size = config.plan.layers(model.anatomy.layers)
    if size > model.anatomy.layers:
        raise UserError(f"plan.size is {size} but {model.name} has {model.anatomy.layers} layers; give fewer, or null.")
    with together(acc):
        if acc.is_main_process:
            about = {"facts": {"count": len(facts), "sha256": facts_hash(facts)}, "devices": launch_facts(acc)}
            RunFolder.create(config.out, config, resume=config.resume, facts=about, same=("facts",))
    run = RunFolder(config.out, main=acc.is_main_process)
    effects = trace(
        model,
        facts,
        config.corruption,
        kinds=config.kinds,
        window=config.window,
        metric=config.metric,
        engine=config.engine,
        prompt=config.prompt,
        positions=config.positions,
        sever=config.sever,
        memory=config.memory,
        max_facts=config.max_facts,
        cache=run.path / "facts",
        workers=Workers(acc.process_index, acc.num_processes, acc.wait_for_everyone),
    )
    plan = choose_layers(
        effects,
        size=size,
        kind=config.plan.kind,
        roles=config.plan.roles,
        seed=config.seed,
        confidence=config.plan.confidence,
        stability=config.plan.stability,
        least_share=config.plan.least_share,
        aggregation=config.plan.aggregation,
    )
    result = TraceResult(effects=effects, plan=plan, seconds=time.monotonic() - started)
    if acc.is_main_process:
        write_result(
            result, run.path, confidence=config.plan.confidence, seed=config.seed, aggregation=config.plan.aggregation
        )
        before = run.manifest.get("seconds", 0.0)  # of earlier calls, if this one went on with their facts
        run.finish(seconds=before + result.seconds, peak_memory_bytes=peak_memory_bytes())
    acc.wait_for_everyone()
    return result


def write_result(
    result: TraceResult,
    folder: Path,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    aggregation: Aggregation = "fixed",
) -> None:
    """Everything but the run's own records."""
    effects, plan = result.effects, result.plan
    tables = [effects.table(kind, confidence=confidence, seed=seed, aggregation=aggregation) for kind in effects.kinds]
    effects.save(folder / "effects.npz")
    write_json(folder / "effects.json", readable(effects, tables))
    kinds = ("mlp", "attn") if plan.evidence["kind"] == "both" else (plan.evidence["kind"],)
    tentative = not plan.singled_out
    write_atomic(folder / "effects.png", figure(tables, band=plan.layers, band_kinds=kinds, tentative=tentative))
    for table in tables:
        band = plan.layers if table.kind in kinds else ()
        heatmap(table, folder / f"{table.kind}.png", band=band, tentative=tentative)
    plan.save(folder / "plan.json")  # last: a plan means that the stage ended well


def readable(effects: Effects, tables: Sequence[EffectTable]) -> dict[str, Any]:
    """The means as plain data: scores a fact, what was left out, and a table a kind (null where no fact has the role)."""
    return {
        "metric": effects.metric,
        "window": effects.window,
        "sigma": effects.sigma,
        "clean_mean": float(effects.clean.mean()),
        "corrupted_mean": float(effects.corrupted.mean()),
        "facts": [
            {**asdict(fact), "clean": float(clean), "corrupted": float(corrupted)}
            for fact, clean, corrupted in zip(effects.facts, effects.clean, effects.corrupted, strict=True)
        ],
        "left_out": [{**asdict(one.fact), "reason": one.reason} for one in effects.skipped],
        "tables": {
            table.kind: {
                role: {
                    "facts": int(table.facts[row]),
                    "mean": _numbers(table.mean[row]),
                    "low": _numbers(table.low[row]),
                    "high": _numbers(table.high[row]),
                }
                for row, role in enumerate(table.roles)
            }
            for table in tables
        },
        "provenance": dict(effects.provenance),
    }


def drawn(facts: Sequence[Fact], max_facts: int | None, seed: int) -> list[Fact]:
    """The facts in the order in which they are asked: as they come, or shuffled where only some are wanted."""
    if max_facts is None:
        return list(facts)
    return [facts[index] for index in np.random.default_rng(seed).permutation(len(facts))]


def facts_hash(facts: Sequence[Fact]) -> str:
    """The SHA-256 of the facts, in order."""
    return hashlib.sha256(json.dumps([asdict(fact) for fact in facts]).encode()).hexdigest()


def _numbers(values: Any) -> list[float] | None:
    return None if np.isnan(values).any() else [float(value) for value in values]
