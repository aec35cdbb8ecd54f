"""One contender of `benchmarks/unlearning.py` in a process of its own: this project's trainer, or the plain way.

    python -m benchmarks.unlearning_contenders '{"name": "ours", "objective": "npo", ...}'

Speaks JSON, one line a message: any word in lets it go on to the end of its turn, seconds and losses come out; an empty line
ends it with the peak of memory. The plain way is what most code for unlearning does: a subclass of Hugging Face's `Trainer` whose
`compute_loss` runs the model on the forget and on the retain rows, with the logits of every token, and asks a deep copy of the
model for whatever is wanted of the original one. It is given more care than is usual: only what is in the scope requires
gradients, the copy runs on those rows alone that need it, nothing pads to more than the longest row, and each token of the
global batch counts alike. Both draw the same rows at each step, and take as many at once: `micro_batch` of each side.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.sae_contenders import forget_peak, memory
from lm.devices import accelerator
from lm.loading import load
from lm.model import LanguageModel
from lm.prompts import Encoded
from lm.run_folder import RunFolder
from unlearn.forward.passes import collate
from unlearn.objectives import NPO, RMU, Joint, Loss
from unlearn.objectives.rmu import direction
from unlearn.scope.scope import Scope
from unlearn.training.batches import StepRows, micro_batches
from unlearn.training.config import TrainerConfig
from unlearn.training.loop import train
from unlearn.training.side import Side


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a contender is told."""

    name: str
    objective: str
    """`joint`, `npo` or `rmu`."""
    model: str
    rows: str
    """A file: for each side its rows, [ids, answer_start] each."""
    layers: tuple[int, ...]
    """Whose MLPs learn with `joint`."""
    layer: int
    """Whose stream `rmu` reads; the MLPs of it and of the two before learn."""
    batch: int
    micro_batch: int
    narrow: int
    """Tokens at once of `ours_narrow`."""
    steps: int
    """Of all turns together."""
    turn: int
    """Steps in a turn."""
    rate: float
    autocast: str
    device: str
    threads: int

    def scope(self) -> Scope:
        """What learns."""
        if self.objective == "npo":
            return Scope(layers="model")
        return Scope(layers=self.layers if self.objective == "joint" else tuple(range(self.layer - 2, self.layer + 1)))

    def loss(self) -> Loss:
        """What is minimized, as published: no cap; the joint method's weight, with no more than an epoch, stays at its least."""
        found = {"joint": Joint(forget_cap=None), "npo": NPO(), "rmu": RMU(layer=self.layer)}
        return Loss.of(found[self.objective])

    def trainer(self) -> TrainerConfig:
        """How the loop runs."""
        return TrainerConfig(
            steps=self.steps,
            batch=self.batch,
            micro_batch=self.micro_batch,
            micro_tokens=self.narrow if self.name == "ours_narrow" else None,
            learning_rate=self.rate,
            autocast=self.autocast,  # type: ignore[arg-type]
            reference="live" if self.name == "ours_live" else "cached",
            estimate=False,
            evaluate_every=self.turn,
            save_every=10**9,
        )

    def sides(self) -> dict[str, list[Encoded]]:
        """The rows of `forget` and of `retain`."""
        found = json.loads(Path(self.rows).read_text())
        return {side: [Encoded(ids, start) for ids, start in rows] for side, rows in found.items()}


Turn = Callable[[nn.Module, list[float]], None]
"""Called at the end of each turn with the model and the turn's losses; it returns when the next may begin."""


def prepared(work: Work) -> LanguageModel:
    """The model, on its device, with the scope applied."""
    model = load(work.model, dtype="float32", device=work.device)
    work.scope().resolve(model.anatomy).apply(model.model, model.anatomy)
    return model


def ours(work: Work, model: LanguageModel, turn: Turn) -> None:
    """This project's trainer, which waits for its turn where it would score."""
    acc = accelerator(mixed_precision=work.autocast, cpu=work.device == "cpu")  # type: ignore[arg-type]
    rows = work.sides()
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder.create(Path(folder) / "run", work)
        log = Path(folder) / "run" / "metrics.jsonl"

        def wait(memory: object) -> dict[str, float]:
            losses = [line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
            turn(model.model, losses[-work.turn :])
            return {}

        sides = Side(rows["forget"]), Side(rows["retain"])
        train(acc, model, *sides, work.loss(), work.trainer(), run=run, made_from="start", validate=wait)


def plain(work: Work, model: LanguageModel, turn: Turn) -> None:
    """Hugging Face's `Trainer`."""
    rows = work.sides()
    batches = work.trainer().batches(len(rows["forget"]), len(rows["retain"]))
    items = [item for step in range(work.steps) for item in micros(work, batches.step(step), rows)]
    each = len(items) // work.steps
    with tempfile.TemporaryDirectory() as folder:
        told = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,  # an item is a micro-batch
            gradient_accumulation_steps=each,
            max_steps=work.steps,
            learning_rate=work.rate,
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            bf16=work.autocast == "bf16",
            use_cpu=work.device == "cpu",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        waits = Waits(work, turn)
        trainer = Plain(work, model, waits, args=told, train_dataset=items, data_collator=lambda many: many[0])
        trainer.add_callback(waits)
        trainer.train()


def micros(work: Work, step: StepRows, rows: dict[str, list[Encoded]]) -> list[dict[str, Any]]:
    """A step's micro-batches, each with rows of both sides and the counts of the global batch."""
    sides = {"forget": step.forget, "retain": step.retain}
    chosen = {side: [rows[side][place] for place in places] for side, places in sides.items()}
    parts = {side: micro_batches(some, work.micro_batch, 0, 1) for side, some in chosen.items()}
    counts = {
        side: (sum(len(row.ids) - row.answer_start for row in some), len(some), sum(len(row.ids) for row in some))
        for side, some in chosen.items()
    }
    together = zip(parts["forget"], parts["retain"], strict=True)
    return [{"forget": forget, "retain": retain, "counts": counts} for forget, retain in together]


class Waits(TrainerCallback):
    """Adds up a step's loss, and waits at the end of a turn."""

    def __init__(self, work: Work, turn: Turn) -> None:
        self.work, self.turn, self.now = work, turn, 0.0
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        self.losses, self.now = [*self.losses, float(self.now)], 0.0
        if state.global_step % self.work.turn == 0:
            self.turn(model, self.losses)
            self.losses = []


class Plain(Trainer):
    """Both sides through the model with every logit, the original model from a copy, one loss, one backward pass."""

    def __init__(self, work: Work, model: LanguageModel, waits: Waits, **rest: Any) -> None:
        super().__init__(model=model.model, **rest)
        self.work, self.waits, self.pad = work, waits, int(model.tokenizer.pad_token_id)
        self.loss_is_scaled_for_ga = True
        self.original = None if work.objective == "joint" else copy.deepcopy(model.model).requires_grad_(False).eval()
        self.block = model.anatomy.block_path(work.layer)

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **rest: Any) -> Any:
        forget, retain = (collate(inputs[side], self.pad, self.args.device) for side in ("forget", "retain"))
        (forget_tokens, forget_rows, forget_all), (retain_tokens, _, retain_all) = (
            inputs["counts"][side] for side in ("forget", "retain")
        )
        if self.work.objective == "joint":
            alpha = 1.2  # the least, which is that of the first epoch
            loss = -self.cross_entropies(model, forget).sum() / forget_tokens
            loss = loss + alpha * self.cross_entropies(model, retain).sum() / retain_tokens
        elif self.work.objective == "npo":
            beta = 0.1
            now = -self.cross_entropies(model, forget).sum(dim=1)
            with torch.no_grad():
                before = -self.cross_entropies(self.original, forget).sum(dim=1)
            loss = -2.0 / beta * logsigmoid(-beta * (now - before)).sum() / forget_rows
            loss = loss + self.cross_entropies(model, retain).sum() / retain_tokens
        else:
            away = self.stream(model, forget)
            target = 6.5 * direction(away.shape[-1], 0).to(away)
            loss = self.apart(away, target, forget) / forget_all
            with torch.no_grad():
                before = self.stream(self.original, retain)
            loss = loss + 1200.0 * self.apart(self.stream(model, retain), before, retain) / retain_all
        self.waits.now = self.waits.now + loss.detach()
        return loss

    def cross_entropies(self, model: Any, inputs: Any) -> Tensor:
        """(rows, tokens - 1) in nats, 0 where nothing is supervised."""
        with self.accelerator.autocast():
            logits = model(input_ids=inputs.ids, attention_mask=inputs.attention, use_cache=False).logits
        labels = torch.where(inputs.mask, inputs.targets, -100)
        found = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none")
        return found.view(labels.shape)

    def stream(self, model: Any, inputs: Any) -> Tensor:
        """(rows, tokens, hidden) after the block, from a forward hook."""
        kept: list[Tensor] = []
        block = self.accelerator.unwrap_model(model).get_submodule(self.block)
        hook = block.register_forward_hook(lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out))
        with self.accelerator.autocast():
            model(input_ids=inputs.ids, attention_mask=inputs.attention, use_cache=False)
        hook.remove()
        return kept[0]

    def apart(self, one: Tensor, other: Tensor, inputs: Any) -> Tensor:
        """Mean squared distance over dimensions, summed over real tokens."""
        return ((one.float() - other.float()).square().mean(dim=-1) * inputs.attention).sum()


CONTENDERS = {"ours": ours, "ours_live": ours, "ours_narrow": ours, "plain": plain}


class Finished(Exception):
    """No further turn is wanted."""


def main(work: Work, say: Callable[[Any], None]) -> None:
    torch.set_num_threads(work.threads)
    cuda = work.device != "cpu"
    held = torch.cuda.memory_allocated() if cuda else memory("VmRSS")
    model = prepared(work)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()
    say({"held": held, "loaded": torch.cuda.memory_allocated() if cuda else memory("VmRSS")})
    began = [0.0, 0.0]

    def start() -> None:
        if not sys.stdin.readline().strip():
            say({"peak": torch.cuda.max_memory_allocated() if cuda else memory("VmHWM")})
            raise Finished
        began[:] = time.perf_counter(), time.process_time()

    def turn(_: nn.Module, losses: list[float]) -> None:
        if cuda:
            torch.cuda.synchronize()
        seconds, busy = time.perf_counter() - began[0], time.process_time() - began[1]
        say({"seconds": seconds, "cpu": busy, "losses": losses})
        start()

    try:
        start()
        CONTENDERS[work.name](work, model, turn)
    except Finished:
        return


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print must not mix with the messages
    told = json.loads(sys.argv[1])
    main(
        Work(**{**told, "layers": tuple(told["layers"])}),
        lambda message: print(json.dumps(message), file=channel, flush=True),
    )
