"""Resident memory of a trace, beside what it was allowed: the peak above the loaded model, in a process of its own.

    python -m benchmarks.tracing_memory --model builtin --samples 200 --memory 0.05
    python -m benchmarks.tracing_memory --model FOLDER --facts known_facts.json --samples 200 --memory 0.2

The model is loaded and one fact traced with one sample, so that what the libraries keep is there; then the kernel's mark of the
peak is set back (Linux alone can), and the fact is traced. What lies above the budget is the allocator's and the libraries'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lm import UserError, load
from lm.anatomy import Kind
from lm.config import script
from lm.run_folder import resident_bytes
from tracing import GaussianNoise, trace
from tracing.question.fact_source import FactSource
from tracing.question.metrics import MetricName


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One number."""

    model: str = "builtin"
    """A model's folder or hub id, or builtin."""
    facts: str = "builtin:forget"
    """Where the fact comes from: the first one that the model knows is traced."""
    samples: int = 200
    """Corrupted copies."""
    memory: float = 0.05
    """Gigabytes that the trace may take."""
    kinds: tuple[Kind, ...] = ("resid", "mlp", "attn")
    """What is restored."""
    window: int = 1
    """Of layers."""
    metric: MetricName = "probability"
    """What is read off."""
    threads: int = 1
    """Threads."""


def main(asked: Benchmark) -> None:
    torch.set_num_threads(asked.threads)
    model = load(asked.model, device="cpu")
    tasks = ("Task2",) if asked.facts.startswith("builtin") else ()
    facts = FactSource(sources=asked.facts, tasks=tasks, leave_out_unnamed=True).read()
    noise = GaussianNoise(samples=asked.samples)
    once = trace(
        model, facts, corruption=replace(noise, samples=1), kinds=("mlp",), positions="subject_and_last", max_facts=1
    )
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():
        raise UserError("the peak of resident memory cannot be set back on this system; run this on Linux")
    mark.write_text("5")
    before = resident_bytes()
    trace(
        model,
        facts,
        noise,
        kinds=asked.kinds,
        window=asked.window,
        metric=asked.metric,
        memory=asked.memory,
        only=once.facts,
    )
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    print(
        f"{model.name}, {len(once.tokens[0])} tokens, {asked.samples} samples, memory {asked.memory} GB: the peak of resident "
        f"memory is {(peak - before) / 1e6:,.0f} MB above the {before / 1e6:,.0f} MB before"
    )


if __name__ == "__main__":
    script(main, Benchmark, description=__doc__)
