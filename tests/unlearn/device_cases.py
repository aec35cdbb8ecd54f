"""Whole runs that are made by one process (`test_devices_in_training.py`) and, as a program, by several.

`accelerate launch … device_cases.py JOBS` makes the pickled jobs one after the other.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

import unlearn
from lm.errors import UserError
from lm.loading import load
from sae.activations.sources import Texts
from unlearn import stage
from unlearn.alternates.base import Refusals
from unlearn.config import UnlearnConfig
from unlearn.forward import passes
from unlearn.gradient_filter import GradientFilter
from unlearn.objectives import DPO, NPO, PDU, RMU, AdaptiveRMU, Fixed, Joint, KLMinimization, LookUnseen
from unlearn.perturbation import Noise, Part, Reinitialize
from unlearn.scope.scope import Lora, Scope, WeightMask
from unlearn.training import loop as trainer
from unlearn.training.config import TrainerConfig
from unlearn.training.step import Stepper

CHUNK = 5
"""Tokens whose logits exist at once: several chunks a micro-batch, and not equally many on each process."""

FIVE = TrainerConfig(steps=4, batch=10, micro_batch=2, learning_rate=3e-3, save_every=2, estimate=False)
"""Five rows a side: the processes' shares differ in size."""

ONE = replace(FIVE, batch=2)
"""One row a side: the second process has none."""

GENERAL = Texts(texts=("the house stands by the sea", "rain fell all night on the town", "a b c d e f g h"))
CASES: dict[str, dict[str, Any]] = {
    "joint": {
        "objective": Joint(),
        "trainer": replace(FIVE, weighting="global_rows", save_every=1, estimate=True, evaluate_every=2),
    },
    "joint, the authors' batches": {
        "objective": Joint(),
        "trainer": replace(FIVE, weighting="micro_batch_mean", pairing="mixed_shuffle", evaluate_every=2),
    },
    "joint, in chunks": {
        "objective": Joint(),
        "trainer": replace(FIVE, pairing="sequential", chunk=4, retain_per_forget=4),
    },
    "kl, one row a side": {"objective": KLMinimization(), "trainer": replace(ONE, estimate=True)},
    "rmu, one row a side": {"objective": RMU(layer=1), "scope": Scope(layers=(0, 1)), "trainer": ONE},
    "dpo, one row a side": {"objective": DPO(), "alternates": Refusals(per_row=2), "trainer": ONE},
    "dual": {"objective": PDU(), "scope": Scope(layers=(0, 1)), "trainer": replace(FIVE, warmup=2)},
    "npo, kept": {"objective": NPO(), "trainer": replace(FIVE, cache_below=True)},
    "npo, whole model, exchanged": {
        "objective": NPO(),
        "scope": Scope(layers="model"),
        "trainer": replace(FIVE, reference="live", evaluate_every=2, checkpoint="best_task_aggregate"),
    },
    "kl": {"objective": KLMinimization(), "trainer": replace(FIVE, gradient_checkpointing=True)},
    "kl, adapters": {
        "objective": KLMinimization(),
        "scope": Scope(layers=(1,), modules=("all",), lora=Lora(rank=2)),
        "trainer": replace(FIVE, evaluate_every=2, checkpoint="lowest_joint_loss"),
    },
    "joint, adapters with lengths": {
        "objective": Joint(),
        "scope": Scope(layers=(1,), lora=Lora(rank=2, use_dora=True)),
    },
    "wiped, healed, unseen": {
        "perturbation": Noise(
            scale=0.3,
            parts=(Part(share=0.7, layers=(1,)), Part(share=0.9, also=("embeddings",), unhealed=True), Part(share=0.3)),
        ),
        "objective": LookUnseen(renew=1, match="quantiles", within=0.1),
        "scope": Scope(layers="model"),
        "general": GENERAL,
        "trainer": replace(
            FIVE,
            pairing="streams",
            forget_share=0.3,
            general_share=0.3,
            forget_from=0.25,
            forget_ramp=0.5,
            cached_logits=50,
        ),
    },
    "made anew, in folds": {
        "perturbation": Reinitialize(parts=(Part(share=0.8, layers=(1,), modules=("mlp",)),)),
        "objective": KLMinimization(),
        "trainer": replace(FIVE, folds=2, gradient_filter=GradientFilter(share=0.2)),
    },
    "rmu": {"objective": RMU(layer=1), "scope": Scope(layers=(0, 1))},
    "adaptive rmu, kept": {"objective": AdaptiveRMU(layer=1), "trainer": replace(FIVE, cache_below=True)},
    "dpo": {"objective": DPO(), "alternates": Refusals(per_row=2), "trainer": replace(FIVE, micro_batch=3)},
    "npo, masked": {
        "objective": NPO(),
        "retain_weight": Fixed(factor=3.0),
        "scope": Scope(layers="model", mask=WeightMask(share=0.3)),
        "trainer": replace(FIVE, weight_decay=0.1),
    },
}

GO_ON = ("dual", "wiped, healed, unseen", "npo, kept", "npo, whole model, exchanged", "kl, adapters", "npo, masked")
"""Stopped after step 3, of which 2 are saved, and gone on with."""
STOP = 3
HELD = ("npo, kept", "joint, adapters with lengths")
"""Made in memory too."""


@dataclass(frozen=True)
class Job:
    """One call of the stage.

    Attributes:
        stop: after this step the run is broken off, as by an error.
        copy: also leave a copy of the run folder, as it was then, at `<out>.copy`.
        held: no stage, but the same in memory: each process leaves its result's weights at `<out>.<rank>.safetensors`.
    """

    config: UnlearnConfig
    stop: int | None = None
    copy: bool = False
    held: bool = False


Ran = list[list[tuple[bool, tuple[int, ...]]]]
"""For each step the micro-batches that a process ran: (forget rows?, their places)."""


class Stop(Exception):
    """The end of a run that is broken off."""


@contextmanager
def stopping(step: int | None) -> Iterator[None]:
    """While open, a run ends after `step`."""
    usual = trainer._Loop._milestones

    def milestones(loop: trainer._Loop) -> None:
        usual(loop)
        if loop.at.step == step:
            raise Stop

    trainer._Loop._milestones = milestones  # type: ignore[method-assign]
    try:
        yield
    except Stop:
        pass
    finally:
        trainer._Loop._milestones = usual  # type: ignore[method-assign]


@contextmanager
def watching() -> Iterator[Ran]:
    """While open, what this process runs is noted."""
    ran: Ran = []
    gradient, stats = Stepper.gradient, Stepper._stats

    def noted_gradient(stepper: Stepper, *args: Any, **settings: Any) -> Any:
        ran.append([])
        return gradient(stepper, *args, **settings)

    def noted_stats(stepper: Stepper, rows: Any, *, forget: bool, epoch: int) -> Any:
        if ran:
            ran[-1].append((forget, tuple(rows)))
        return stats(stepper, rows, forget=forget, epoch=epoch)

    Stepper.gradient, Stepper._stats = noted_gradient, noted_stats  # type: ignore[method-assign]
    try:
        yield ran
    finally:
        Stepper.gradient, Stepper._stats = gradient, stats  # type: ignore[method-assign]


def work(jobs: list[Job]) -> None:
    """Make the jobs, with little vocabulary at once."""
    usual = passes.chunk_tokens
    passes.chunk_tokens = lambda *_, **__: CHUNK  # type: ignore[assignment]
    try:
        for job in jobs:
            if job.held:
                hold(job.config)
                continue
            with stopping(job.stop), watching() as ran:
                stage.run_unlearn(job.config)
            place = Path(job.config.out)
            place.with_name(f"{place.name}.{os.environ.get('RANK', '0')}.rows").write_bytes(pickle.dumps(ran))
            if job.copy:
                _copy(Path(job.config.out))
    finally:
        passes.chunk_tokens = usual


def hold(config: UnlearnConfig) -> None:
    """Unlearn in memory; where that is refused, leave the reason at `<out>.<rank>.refused`."""
    place = Path(config.out).with_name(f"{Path(config.out).name}.{os.environ.get('RANK', '0')}")
    try:
        result = unlearn.unlearn(
            load(config.model, device="cpu"),
            config.forget,
            config.retain,
            objective=config.objective,
            scope=config.scope,
            trainer=config.trainer,
        )
    except UserError as error:
        place.with_name(f"{place.name}.refused").write_text(str(error))
        return
    save_file(dict(result.model.model.named_parameters()), place.with_name(f"{place.name}.safetensors"))


def _copy(folder: Path) -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        shutil.copytree(folder, folder.with_name(f"{folder.name}.copy"))
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    from lm.devices import leave_process_group

    work(pickle.loads(Path(sys.argv[1]).read_bytes()))
    leave_process_group()
