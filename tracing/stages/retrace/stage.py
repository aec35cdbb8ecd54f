"""The stage that traces again after unlearning: from the effects of the first trace to what changed. Wiring only."""

from __future__ import annotations

import hashlib
from pathlib import Path

from lm.devices import accelerator, launch_facts, load_here, together
from lm.run_folder import RunFolder, peak_memory_bytes, stage, write_json
from tracing.effects.before_after import Difference, difference
from tracing.effects.effects import Effects
from tracing.plots.pictures import plot_difference
from tracing.retracing import retrace
from tracing.settings import Workers
from tracing.stages.retrace.config import RetraceConfig
from tracing.stages.trace.stage import readable_tables


@stage
def run_retrace(config: RetraceConfig) -> Difference:
    """Trace again as the config says.

    Writes into `config.out`: `effects.npz` (every cell afterwards), `difference.json` (scores, strongest cells, and tables of
    before, after and change with intervals) and a `KIND.png` a kind.

    Raises:
        UserError: whatever the user can mend; finished facts stay in the run folder.
    """
    path = Path(config.before) / "effects.npz" if Path(config.before).is_dir() else Path(config.before)
    before = Effects.load(path)
    acc = accelerator(cpu=config.model.device == "cpu")
    model = load_here(acc, config.model)
    with together(acc):
        if acc.is_main_process:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            about = {"before": digest, "devices": launch_facts(acc)}
            RunFolder.create(config.out, config, resume=config.resume, facts=about, same=("before",), free=("memory",))
    run = RunFolder(config.out, main=acc.is_main_process)
    after = retrace(
        model,
        before,
        kinds=config.kinds,
        engine=config.engine,
        memory=config.memory,
        cache=run.path / "facts",
        workers=Workers(acc.process_index, acc.num_processes, acc.wait_for_everyone),
    )
    change = difference(before, after, confidence=config.confidence, seed=config.seed)
    if acc.is_main_process:
        after.save(run.path / "effects.npz")
        for kind in change.kinds:
            plot_difference(change, kind).save(run.path / f"{kind}.png")
        parts = {"before": change.before, "after": change.after, "change": change.change}
        tables = {name: readable_tables(list(of_part.values())) for name, of_part in parts.items()}
        write_json(run.path / "difference.json", {**change.to_json(), "tables": tables}, private=True)
        run.finish(peak_memory_bytes=peak_memory_bytes())
    acc.wait_for_everyone()
    return change


def describe(config: RetraceConfig, change: Difference) -> str:
    """What the command prints at the end: what became of the strongest cell of each kind."""
    sentences = [change.sentence(kind) for kind in change.kinds]
    return "\n".join([*sentences, f"wrote {config.out}/effects.npz, difference.json and a picture a kind"])
