"""The stage that traces again after unlearning: from the effects of the first trace to what changed. Wiring only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from lm.anatomy import Kind
from lm.devices import accelerator, launch_facts, load_here, together
from lm.errors import UserError
from lm.model import ModelSpec
from lm.run_folder import RunFolder, peak_memory_bytes, write_json
from tracing.bootstrap import check_confidence
from tracing.causal_tracing import Workers
from tracing.effects.before_after import Difference, difference
from tracing.effects.effects import Effects
from tracing.engine.engines import EngineName
from tracing.plots.pictures import plot_difference
from tracing.retracing import retrace
from tracing.stages.trace.stage import readable_tables


@dataclass(frozen=True, kw_only=True)
class RetraceConfig:
    """A changed model, and the effects of the one it came from: facts, noise, metric and cells are those of the first trace."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The changed model."""
    before: str = "runs/trace"
    """The run folder of the first trace, or its effects.npz."""
    kinds: tuple[Kind, ...] | None = None
    """Trace only these kinds again; null traces all that were traced."""
    engine: EngineName | None = None
    """How cells are computed; null: as before."""
    memory: float = 2.0
    """Gigabytes that the wavefront may take beside the model, about; a run may go on with another number."""
    confidence: float = 0.95
    """Of the intervals of what changed."""
    seed: int = 0
    """Of the resampling."""
    out: str = "runs/retrace"
    """The run folder."""
    resume: bool = False
    """Go on with the trace in `out`: finished facts are not traced again."""

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; give 0 or more")


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
    found = difference(before, after, confidence=config.confidence, seed=config.seed)
    if acc.is_main_process:
        after.save(run.path / "effects.npz")
        for kind in found.kinds:
            plot_difference(found, kind).save(run.path / f"{kind}.png")
        parts = {"before": found.before, "after": found.after, "change": found.change}
        tables = {name: readable_tables(list(one.values())) for name, one in parts.items()}
        write_json(run.path / "difference.json", {**found.to_json(), "tables": tables})
        run.finish(peak_memory_bytes=peak_memory_bytes())
    acc.wait_for_everyone()
    return found
