"""Steps of unlearning beside the plain way with Hugging Face's `Trainer`: tokens a second and peak memory.

    python -m benchmarks.unlearning --model FOLDER --out runs/unlearning-benchmark
    python -m benchmarks.unlearning --width 1024 --autocast bf16

Three tasks: the constrained joint objective on the MLPs of some layers, NPO on the whole model, RMU; what the plain way is says
`benchmarks/unlearning_contenders.py`. Same weights, rows, batches, rows at once, scope, optimizer (fused AdamW), clipping and
rates. Rows are text of the built-in world, cut to the lengths that LUME's have. Every contender lives in a fresh process of its
own and waits while another one works: rounds are interleaved, in an order that rotates; a first round, in which all that is done
once is done, is not counted. Prints, and writes as table.md: medians over the rounds, ratios as medians of the ratios within a
round, memory above what the process held after its imports (on a GPU: torch's), and the largest difference of any step's loss
from ours.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoConfig

from benchmarks.sae import Worker
from lm import UserError, load
from lm.config import script
from lm.row_files import load_rows
from lm.run_folder import write_atomic, write_json
from unlearn.training.batches import PairedBatches

TASKS = ("joint", "npo", "rmu")
NAMES = ("ours", "ours_live", "ours_narrow", "plain")
# fmt: off
LUME: dict[str, tuple[tuple[int, int], ...]] = {
    "forget": (
        (182, 35), (12, 10), (41, 69), (162, 50), (184, 49), (13, 10), (11, 10), (38, 52), (237, 53), (219, 69), (11, 10),
        (192, 38), (11, 9), (187, 37), (163, 29), (10, 10), (240, 45), (13, 10), (9, 8), (41, 73), (168, 48), (12, 11),
        (11, 10), (10, 10),
    ),
    "retain": (
        (39, 76), (17, 9), (190, 48), (12, 5), (11, 10), (23, 5), (10, 9), (11, 11), (70, 40), (12, 30), (11, 10),
        (11, 11), (10, 10), (12, 11), (241, 87), (23, 3), (224, 63), (18, 3), (60, 43), (10, 11), (220, 46), (17, 3),
        (178, 33), (22, 3),
    ),
}
# fmt: on
"""Tokens of question and answer: every 46th, or 47th, row of the train splits, with SmolLM2's tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One table."""

    model: str | None = None
    """A pretrained model's folder; null: a random OLMo."""
    blocks: int = 16
    """Of the random model."""
    width: int = 1024
    """Of the random model (2048 is OLMo-1B's); MLPs are four times as wide, heads half of `width / 64`."""
    vocabulary: int = 50304
    """Of the random model."""
    tasks: tuple[str, ...] = TASKS
    """Which of joint, npo and rmu."""
    contenders: tuple[str, ...] = ("ours", "plain")
    """Who takes part; "ours" must. ours_live asks the original model at every step, as the plain way does; ours_narrow
    takes no more than `narrow` tokens at once."""
    layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    """Whose MLPs learn with the joint objective."""
    layer: int = 7
    """Whose stream RMU steers; the MLPs of it and of the two before learn."""
    lengths: Literal["lume", "even"] = "lume"
    """As LUME's rows, of very different lengths, or all alike: `longest` tokens, 16 of them the answer."""
    longest: int = 256
    """Tokens beyond which a row is cut."""
    batch: int = 24
    """Rows a step, both sides together."""
    micro_batch: int = 6
    """Rows of each side at once."""
    narrow: int = 256
    """Tokens at once of ours_narrow, padding included."""
    steps: int = 1
    """Steps of one contender before the next one's turn."""
    rounds: int = 3
    """Turns that are counted; one more goes before."""
    rate: float = 1e-5
    """The learning rate at the first step; it falls linearly."""
    autocast: Literal["no", "bf16"] = "no"
    """Compute in this type over float32 weights."""
    threads: int = 1
    """Threads of each contender; only one works at a time."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where. On cuda memory is torch's peak, and time is awaited."""
    clock: Literal["wall", "cpu"] = "wall"
    """What time is counted: "cpu" (of all threads) on a machine that is busy with other work, with one thread."""
    seed: int = 0
    """Of the random model."""
    out: str = "runs/unlearning-benchmark"
    """The folder for results.json and table.md."""

    def __post_init__(self) -> None:
        for given, known, what in ((self.tasks, TASKS, "tasks"), (self.contenders, NAMES, "contenders")):
            if not given or set(given) - set(known):
                raise UserError(f"{what} {', '.join(given)}: take some of {', '.join(known)}")
        if "ours" not in self.contenders:
            raise UserError("contenders without ours: everything is compared with ours; add it")
        if self.device == "cuda" and (self.clock == "cpu" or not torch.cuda.is_available()):
            raise UserError("device cuda needs a GPU that torch sees, and wall time")


def main(asked: Benchmark) -> None:
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or str(random_model(asked, Path(folder) / "model"))
        sides = rows(asked, model)
        file = Path(folder) / "rows.json"
        file.write_text(json.dumps(sides))
        for task in asked.tasks:
            found[task] = race(asked, task, model, file)
            write_json(Path(asked.out) / "results.json", {"asked": asdict(asked), "found": found})
    text = table(asked, found, tokens(asked, sides))
    write_atomic(Path(asked.out) / "table.md", text + "\n")
    print(text)


def random_model(asked: Benchmark, folder: Path) -> Path:
    """An OLMo of random weights, with the built-in tokenizer."""
    tokenizer = load("builtin", device="cpu").tokenizer
    torch.manual_seed(asked.seed)
    config = OlmoConfig(
        vocab_size=asked.vocabulary,
        hidden_size=asked.width,
        intermediate_size=4 * asked.width,
        num_hidden_layers=asked.blocks,
        num_attention_heads=max(asked.width // 128, 1),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(asked: Benchmark, model: str) -> dict[str, list[tuple[list[int], int]]]:
    """For each side as many rows as all steps read: token ids, and where the answer starts."""
    tokenizer = load(model, device="cpu").tokenizer if model == "builtin" else AutoTokenizer.from_pretrained(model)
    found: dict[str, list[tuple[list[int], int]]] = {}
    for side, lengths in LUME.items():
        text = " ".join(f"{row.input} {row.output}" for row in load_rows(f"builtin:{side}"))
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        found[side] = []
        for number in range(asked.batch // 2 * asked.steps * (asked.rounds + 1)):
            prompt, answer = lengths[number % len(lengths)] if asked.lengths == "lume" else (asked.longest - 16, 16)
            prompt = max(min(prompt, asked.longest - answer), 1)
            answer = min(answer, asked.longest - prompt)
            first = number * 131 % (len(ids) - prompt - answer)
            found[side].append((ids[first : first + prompt + answer], prompt))
    return found


def tokens(asked: Benchmark, sides: dict[str, list[tuple[list[int], int]]]) -> list[int]:
    """Real tokens of each counted turn."""
    batches = PairedBatches(forget=len(sides["forget"]), retain=len(sides["retain"]), batch=asked.batch, seed=42)
    each = []
    for step in range(asked.steps * (asked.rounds + 1)):
        drawn = batches.step(step)
        each.append(
            sum(len(sides["forget"][i][0]) for i in drawn.forget)
            + sum(len(sides["retain"][i][0]) for i in drawn.retain)
        )
    return [sum(each[first : first + asked.steps]) for first in range(asked.steps, len(each), asked.steps)]


def race(asked: Benchmark, task: str, model: str, file: Path) -> dict[str, dict[str, Any]]:
    """Seconds of each round, losses and memory, by contender."""
    fields = ("layers", "layer", "batch", "micro_batch", "narrow", "rate", "autocast", "device", "threads")
    words = {"objective": task, "model": model, "rows": str(file), "turn": asked.steps}
    words |= {"steps": asked.steps * (asked.rounds + 1), **{field: getattr(asked, field) for field in fields}}
    workers: list[Worker] = []
    try:
        for name in asked.contenders:
            workers.append(Worker(name, "benchmarks.unlearning_contenders", words))
        found: dict[str, dict[str, Any]] = {w.name: {**w.about, "seconds": [], "losses": []} for w in workers}
        for number in range(asked.rounds + 1):
            turn = number % len(workers)
            for worker in workers[turn:] + workers[:turn]:
                answer = worker.ask("go")
                found[worker.name]["losses"] += answer["losses"]
                seconds = answer["cpu" if asked.clock == "cpu" else "seconds"]
                if number:
                    found[worker.name]["seconds"].append(seconds)
                else:
                    found[worker.name]["first"] = seconds
        for worker in workers:
            found[worker.name] |= worker.ask("")
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
    return found


def table(asked: Benchmark, found: dict[str, dict[str, Any]], counts: list[int]) -> str:
    """Markdown, one contender of a task a row."""
    what = Path(asked.model).name if asked.model else f"random OLMo, {asked.blocks} blocks, width {asked.width}"
    rows_said = "lengths as LUME's" if asked.lengths == "lume" else "lengths alike"
    where = f"threads {asked.threads}" if asked.device == "cpu" else torch.cuda.get_device_name()
    first = (
        f"{what}, autocast {asked.autocast}, {asked.batch} rows a step, {asked.micro_batch} of a side at once, {rows_said} (to "
        f"{asked.longest} tokens), {asked.rounds} rounds of {asked.steps}, {where}, {asked.clock} time"
    )
    head = [
        "task",
        "contender",
        "tokens/s",
        "ours is faster by",
        "first turn, s",
        "peak MB above imports",
        "ours needs",
    ]
    head += ["losses", "largest relative difference"]
    lines = [first, "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task, contenders in found.items():
        mine = contenders["ours"]
        for name, facts in contenders.items():
            rate = statistics.median(n / t for n, t in zip(counts, facts["seconds"], strict=True))
            ratio = statistics.median(t / m for t, m in zip(facts["seconds"], mine["seconds"], strict=True))
            share = (mine["peak"] - mine["held"]) / (facts["peak"] - facts["held"])
            cells = [task, name, f"{rate:.0f}", f"{ratio:.2f}x", f"{facts['first']:.1f}"]
            cells += [f"{(facts['peak'] - facts['held']) / 1e6:.0f}", f"{share:.2f}"]
            cells += [", ".join(f"{loss:.5g}" for loss in facts["losses"][:3]), f"{apart(facts, mine):.1e}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def apart(facts: dict[str, Any], mine: dict[str, Any]) -> float:
    """The largest relative difference of any step's loss from ours."""
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(facts["losses"], mine["losses"], strict=True))


if __name__ == "__main__":
    script(main, Benchmark, description=__doc__)
