"""A training step of this project beside SAELens, sparsify and dictionary_learning: tokens a second and peak memory.

    pip install -e '.[peers]'
    python -m benchmarks.sae --hidden 768 --features 16384 --k 32 --choice token --out runs/sae-benchmark

Same activations in the same order, same start weights, width, k, batch, threads and rate. Every contender lives in a
fresh process of its own and waits while another one works: rounds are interleaved, in an order that rotates. `optimizer
shipped` leaves each contender the optimizer of its own trainer, `same` gives all of them torch's fused Adam. Prints,
and writes as table.md: medians over the rounds, ratios as medians of the ratios within a round, memory above what the
process held after its imports (on a GPU: torch's), and the first losses. Peers may be in another environment: `--python PATH`.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from lm import UserError
from lm.config import script
from lm.run_folder import write_atomic, write_json

NAMES = ("ours", "saelens", "sparsify", "dictionary_learning")
OTHERS = ("saelens_sparse",)
TOKEN_CHOICE_ONLY = ("sparsify",)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One table."""

    hidden: int = 768
    """Width of the activations."""
    features: int = 16384
    """Width of the dictionary."""
    k: int = 32
    """Mean number of active features a token."""
    choice: Literal["token", "mutual"] = "token"
    """TopK, or BatchTopK (here: mutual choice)."""
    tokens: int = 2048
    """Tokens a step."""
    steps: int = 1
    """Steps of one contender before the next one's turn."""
    rounds: int = 5
    """Turns that are counted; one more goes before."""
    threads: int = 2
    """Threads of each contender; only one works at a time."""
    optimizer: Literal["shipped", "same"] = "shipped"
    """Each contender's own, or fused Adam for all."""
    rate: float = 1e-4
    """The learning rate (sparsify as shipped keeps to its own rule)."""
    contenders: tuple[str, ...] = NAMES
    """Who takes part; "ours" must. saelens_sparse is SAELens with `use_sparse_activations`."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where. On cuda sparsify decodes with its Triton kernels, memory is torch's peak, and time is awaited."""
    clock: Literal["wall", "cpu"] = "wall"
    """What time is counted: "cpu" (of all threads) on a machine that is busy with other work, with one thread."""
    seed: int = 0
    """Of the activations and of the start weights."""
    python: str = sys.executable
    """The interpreter that the contenders run in."""
    out: str = "runs/sae-benchmark"
    """The folder for results.json and table.md."""

    def __post_init__(self) -> None:
        unknown = set(self.contenders) - {*NAMES, *OTHERS}
        if unknown or "ours" not in self.contenders:
            raise UserError(
                f"contenders {', '.join(self.contenders)}: take 'ours' and any of {', '.join((*NAMES[1:], *OTHERS))}"
            )
        if self.device == "cuda" and (self.clock == "cpu" or not torch.cuda.is_available()):
            raise UserError("device cuda needs a GPU that torch sees, and wall time")


def main(asked: Benchmark) -> None:
    names = [n for n in asked.contenders if asked.choice == "token" or n not in TOKEN_CHOICE_ONLY]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "start.safetensors"
        save_file({"activations": activations(asked), "w_dec": start_weights(asked)}, file)
        found = race(asked, names, file)
    text = table(asked, found)
    write_json(Path(asked.out) / "results.json", found)
    write_atomic(Path(asked.out) / "table.md", text + "\n")
    print(text)


def activations(asked: Benchmark) -> torch.Tensor:
    """Four batches, one below the other: a few of many directions, with Zipfian frequencies, and some noise."""
    generator = torch.Generator().manual_seed(asked.seed)
    directions = torch.randn(4 * asked.hidden, asked.hidden, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    frequency = 1 / torch.arange(10, 10 + len(directions)).double()
    count, active = 4 * asked.tokens, 24
    picked = torch.multinomial(frequency.expand(count, -1), active, generator=generator)
    weights = torch.randn(count, active, generator=generator).abs() + 0.5
    clean = torch.nn.functional.embedding_bag(picked, directions, per_sample_weights=weights, mode="sum")
    return clean + 0.05 * torch.randn(count, asked.hidden, generator=generator)


def start_weights(asked: Benchmark) -> torch.Tensor:
    """A decoder of random unit rows; every encoder starts as its transpose, every bias at zero."""
    generator = torch.Generator().manual_seed(asked.seed + 1)
    rows = torch.randn(asked.features, asked.hidden, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


class Worker:
    """A contender's process."""

    def __init__(self, name: str, module: str, words: dict[str, Any], *, python: str = sys.executable) -> None:
        self.name = name
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [python, "-m", module, json.dumps({"name": name, **words})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.about = self.read()

    def ask(self, message: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone: `read` says why
            self.process.stdin.write(message + "\n")
            self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            said = self.log.read().decode(errors="replace").splitlines()
            last = next((line for line in reversed(said) if "Error" in line), "no message")
            raise UserError(
                f"{self.name} stopped ({last[:200]}): is what it needs installed (pip install -e '.[peers]')?"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


def race(asked: Benchmark, names: list[str], file: Path) -> dict[str, dict[str, Any]]:
    """Versions, optimizers, seconds of each round, losses and memory, by contender."""
    workers: list[Worker] = []
    fields = ("k", "choice", "tokens", "threads", "optimizer", "rate", "device")
    words = {"file": str(file), **{field: getattr(asked, field) for field in fields}}
    try:
        workers += [Worker(name, "benchmarks.sae_contenders", words, python=asked.python) for name in names]
        found: dict[str, dict[str, Any]] = {w.name: {**w.about, "seconds": [], "losses": []} for w in workers}
        for number in range(asked.rounds + 1):
            turn = number % len(workers)
            for worker in workers[turn:] + workers[:turn]:
                answer = worker.ask(str(asked.steps))
                found[worker.name]["losses"] += answer["losses"]
                if number:
                    found[worker.name]["seconds"].append(answer["cpu" if asked.clock == "cpu" else "seconds"])
        for worker in workers:
            found[worker.name] |= worker.ask("")
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    return found


def table(asked: Benchmark, found: dict[str, dict[str, Any]]) -> str:
    """Markdown, one contender a row."""
    kind = "TopK" if asked.choice == "token" else "BatchTopK / mutual choice"
    first = (
        f"{kind}, ({asked.hidden}, {asked.features}, {asked.k}), {asked.tokens} tokens a step, {asked.rounds} rounds of "
        f"{asked.steps}, {_where(asked)}, {asked.clock} time, optimizer: {asked.optimizer}"
    )
    head = ["contender", "version", "optimizer", "tokens/s", "ours is faster by", "peak MB above imports", "ours needs"]
    head += ["loss (FVU) at steps 1, 2, 3", "after the last"]
    lines = [first, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    mine = found["ours"]
    for name, facts in found.items():
        rate = asked.tokens * asked.steps / statistics.median(facts["seconds"])
        ratio = statistics.median(t / m for t, m in zip(facts["seconds"], mine["seconds"], strict=True))
        share = (mine["peak"] - mine["held"]) / (facts["peak"] - facts["held"])
        cells = [name, facts["version"], facts["optimizer"], f"{rate:.0f}", f"{ratio:.2f}x"]
        cells += [f"{(facts['peak'] - facts['held']) / 1e6:.0f}", f"{share:.2f}"]
        cells += [", ".join(f"{loss:.4f}" for loss in facts["losses"][:3]), f"{facts['losses'][-1]:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _where(asked: Benchmark) -> str:
    return f"threads {asked.threads}" if asked.device == "cpu" else torch.cuda.get_device_name()


if __name__ == "__main__":
    script(main, Benchmark, description=__doc__)
