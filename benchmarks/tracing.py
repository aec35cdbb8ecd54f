"""The same sweep of causal tracing, six ways: seconds for all cells of a fact, and the largest difference of their numbers.

    pip install -e '.[tracing-peers]'
    python -m benchmarks.tracing --tokens 12 --out runs/tracing-benchmark
    python -m benchmarks.tracing --model FOLDER --tokens 40

A prompt of `tokens` random tokens, its subject replaced by `samples` others; every (token, layer) of the stream and of the MLPs
is restored in turn, and the probability of the clean run's next token read off. The wavefront computes all cells. The loops
(`script_2022`, which makes the whole output as the published script does; `reference`, this project's form of it, which makes
only the output that is read; `dense`, which puts several cells into one batch; TransformerLens and
nnsight as their documentation shows a patching sweep) have the same time for every cell, so `cells` of them, drawn at random, are
timed and multiplied up; what a loop does once for all cells (the ordinary pass that gives the clean values) is timed by itself
and counted once. Contenders take turns in every round. Ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, Olmo2Config, PreTrainedTokenizerFast

from benchmarks.tracing_contenders import CONTENDERS, CellPlace, Contender, Question
from lm import LanguageModel, UserError, load
from lm.anatomy import Kind, anatomy_of
from lm.config import script
from lm.run_folder import write_atomic, write_json
from tracing.question.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One table."""

    model: str | None = None
    """A model's folder or hub id; null: a random OLMo-2 with `layers` layers and width `hidden`."""
    layers: int = 16
    """Of the random model."""
    hidden: int = 256
    """Of the random model."""
    tokens: int = 12
    """Of the prompt. Its subject, three tokens, begins at the third; from 40 on in the middle, as under a chat template."""
    samples: int = 10
    """Corrupted copies."""
    kinds: tuple[Kind, ...] = ("resid", "mlp")
    """What is restored."""
    window: int = 1
    """Of MLPs; above 1 only this project's engines take part."""
    cells: int = 12
    """Cells that each loop is timed on, a round."""
    rounds: int = 3
    """Turns that are counted; one more goes before."""
    threads: int = 1
    """Threads."""
    clock: Literal["wall", "cpu"] = "wall"
    """Wall time, or processor time on a machine that is busy with other work."""
    device: str = "cpu"
    """Where the model is; peers take part on the CPU only."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of the model."""
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Who takes part; wavefront and reference must."""
    seed: int = 0
    """Of weights, tokens and the choice of cells."""
    out: str = "runs/tracing-benchmark"
    """The folder for results.json and table.md."""

    def __post_init__(self) -> None:
        unknown = set(self.contenders) - set(CONTENDERS)
        if unknown or not {"wavefront", "reference"} <= set(self.contenders):
            raise UserError(
                f"contenders {', '.join(self.contenders)}: take wavefront, reference and any of {', '.join(CONTENDERS)}"
            )
        if self.tokens < 8:
            raise UserError(f"a prompt of {self.tokens} tokens is too short: give 8 or more")


def main(asked: Benchmark) -> None:
    torch.set_num_threads(asked.threads)
    model = the_model(asked)
    question = the_question(asked, model)
    names = [name for name in asked.contenders if asked.window == 1 or not CONTENDERS[name].peer]
    if asked.device != "cpu":
        names = [name for name in names if not CONTENDERS[name].peer]
    found = race(asked, model, question, names)
    text = table(asked, model, found)
    write_json(Path(asked.out) / "results.json", found)
    write_atomic(Path(asked.out) / "table.md", text + "\n")
    print(text)


def the_model(asked: Benchmark) -> LanguageModel:
    if asked.model is not None:
        return load(asked.model, dtype=asked.dtype, device=asked.device)
    heads = max(1, asked.hidden // 64)
    config = Olmo2Config(
        vocab_size=50_304,
        hidden_size=asked.hidden,
        intermediate_size=4 * asked.hidden,
        num_hidden_layers=asked.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    torch.manual_seed(asked.seed)
    made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, asked.dtype)).to(asked.device).eval()
    words = Tokenizer(
        WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>")
    )  # TransformerLens wants one
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    name = f"random OLMo-2, {asked.layers} layers, width {asked.hidden}"
    return LanguageModel(made, tokenizer, anatomy_of(made), name)


def the_question(asked: Benchmark, model: LanguageModel) -> Question:
    generator = torch.Generator().manual_seed(asked.seed + 1)
    start = 2 if asked.tokens < 40 else asked.tokens // 2 + 2
    clean = torch.randint(100, model.anatomy.vocabulary - 100, (asked.tokens,), generator=generator)
    corrupted = clean.repeat(asked.samples, 1)
    corrupted[:, start : start + 3] = torch.randint(
        100, model.anatomy.vocabulary - 100, (asked.samples, 3), generator=generator
    )
    with torch.inference_mode():
        answer = int(model.model(clean[None].to(model.device)).logits[0, -1].argmax())
    sweep = Sweep(kinds=asked.kinds, window=asked.window)
    return Question(clean=clean, corrupted=corrupted, span=(start, start + 3), answer=answer, sweep=sweep)


def race(asked: Benchmark, model: LanguageModel, question: Question, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Version, seconds for all cells in each round, and the largest difference from the reference, by contender."""
    everything = [
        (kind, position, layer)
        for kind in asked.kinds
        for position in range(asked.tokens)
        for layer in range(model.anatomy.layers)
    ]
    workers = {name: CONTENDERS[name](model, question) for name in names}
    found: dict[str, dict[str, Any]] = {
        name: {"version": worker.version, "seconds": [], "apart": 0.0} for name, worker in workers.items()
    }
    chance = random.Random(asked.seed)
    for number in range(asked.rounds + 1):
        cells: list[CellPlace] = chance.sample(everything, min(asked.cells, len(everything)))
        expected: list[float] = []
        turn = number % len(names)
        order = ["reference", *(name for name in [*names[turn:], *names[:turn]] if name != "reference")]
        for name in order:
            seconds, values = _timed(asked, workers[name], cells)
            if not workers[name].whole:
                once, _ = _timed(asked, workers[name], [])
                seconds = of_all(seconds, once, len(cells) / len(everything))
            if name == "reference":
                expected = values
            found[name]["apart"] = max(
                found[name]["apart"], *(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(values, expected, strict=True))
            )
            if number:
                found[name]["seconds"].append(seconds)
    return found


def of_all(seconds: float, once: float, share: float) -> float:
    """The seconds of all cells, from those of a share of them with what is done once, and of that alone."""
    return once + max(seconds - once, 0.0) / share


def table(asked: Benchmark, model: LanguageModel, found: dict[str, dict[str, Any]]) -> str:
    """Markdown, one contender a row."""
    where = f"threads {asked.threads}" if asked.device == "cpu" else torch.cuda.get_device_name()
    lines = [
        f"{model.name}, {asked.tokens} tokens, {asked.samples} corrupted copies, {' and '.join(asked.kinds)}, window "
        f"{asked.window}, {asked.dtype}, {asked.rounds} rounds, {where}, {asked.clock} time",
        "",
        "| contender | version | seconds for all cells | wavefront is faster by | largest relative difference |",
        "|---|---|---|---|---|",
    ]
    for name, facts in found.items():
        ratio = statistics.median(t / w for t, w in zip(facts["seconds"], found["wavefront"]["seconds"], strict=True))
        lines.append(
            f"| {name} | {facts['version']} | {statistics.median(facts['seconds']):.2f} | {ratio:.1f}x | {facts['apart']:.1e} |"
        )
    return "\n".join(lines)


def _timed(asked: Benchmark, worker: Contender, cells: Sequence[CellPlace]) -> tuple[float, list[float]]:
    started = _now(asked)
    values = worker.scores(cells)
    return _now(asked) - started, values


def _now(asked: Benchmark) -> float:
    if asked.device != "cpu":
        torch.cuda.synchronize()
    return time.process_time() if asked.clock == "cpu" else time.perf_counter()


if __name__ == "__main__":
    script(main, Benchmark, description=__doc__)
