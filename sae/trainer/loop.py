"""The loop: batches from one stream, a step of every autoencoder, the log, evaluations, checkpoints, exact resume.

It runs on a mesh of any size and loads no model: activations come from any `ActivationStream`, of text, of files or made
up. Before each step all processes agree that every one of them has its rows and that they are finite, so that bad data on
one of them ends all with one sentence instead of leaving the others waiting.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lm.anatomy import Site
from lm.errors import UserError
from lm.run_folder import RunFolder, progress
from sae.activations import ActivationStream
from sae.kernels import Backend
from sae.sharding import Mesh
from sae.trainer import checkpoints
from sae.trainer.config import AutoencoderSpec, Precision
from sae.trainer.evaluation import check_held_out, evaluate
from sae.trainer.results import Trained, finished
from sae.trainer.set_thresholds import needs_calibration, running_threshold, split_held_out
from sae.trainer.step import learning_rate, train_step
from sae.trainer.timing import Phases
from sae.trainer.training_sae import Recipe, TrainingSae

Log = Callable[[int, dict[str, float]], None]


def train_on_stream(
    stream: ActivationStream,
    autoencoders: Mapping[str, tuple[Site, AutoencoderSpec]],
    recipe: Recipe,
    *,
    mesh: Mesh | None = None,
    device: torch.device | str = "cpu",
    run: RunFolder | None = None,
    held_out: Mapping[Site, Tensor] | None = None,
    resume: bool = False,
    stop_at: int | None = None,
    show: bool = True,
    log: Log | None = None,
) -> list[Trained] | None:
    """Train all autoencoders (`named` makes the mapping) from one stream; None if it was stopped before the last step.

    Args:
        stream: gives this process rows `mesh.stream_rank::world` of global batches of `recipe.trainer.batch_tokens`.
        mesh: the processes; every process calls it alike. None: made from the process group, if there is one.
        run: where metrics and checkpoints go; None keeps nothing.
        held_out: (tokens, hidden) of each site, the same on every process.
        resume: go on from the newest checkpoint in `run`, if there is one.
        stop_at: stop after so many steps, with a checkpoint.
        log: is called with every line of the metric log.

    Raises:
        UserError: on every process, if the stream ends early, activations are not finite, training diverges or the disk
            is full. Checkpoints stay.
    """
    loop = Loop(
        stream, autoencoders, recipe, mesh or Mesh(features=recipe.trainer.feature_shards), torch.device(device)
    )
    loop.run, loop.report = run, log
    loop.sample, loop.held_out = split_held_out(
        held_out or {}, recipe.trainer, [spec for _, spec in autoencoders.values()]
    )
    check_held_out(held_out or {}, autoencoders, recipe.trainer, hidden=stream.hidden)
    with _products(recipe.trainer.precision):
        return loop.train(resume=resume, stop_at=stop_at, show=show)


class Loop:
    """The state of one call of `train_on_stream`."""

    run: RunFolder | None = None
    held_out: Mapping[Site, Tensor]
    """What is scored."""
    sample: Mapping[Site, Tensor]
    """What thresholds are calibrated on; empty: the next training tokens."""
    report: Log | None = None

    def __init__(
        self,
        stream: ActivationStream,
        autoencoders: Mapping[str, tuple[Site, AutoencoderSpec]],
        recipe: Recipe,
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        self.stream, self.recipe, self.trainer, self.mesh, self.device = stream, recipe, recipe.trainer, mesh, device
        batch = self.trainer.batch_tokens
        if stream.batch_tokens != batch:
            raise UserError(
                f"the stream gives {stream.batch_tokens} tokens a batch and trainer.batch_tokens is {batch}: make them equal"
            )
        if batch < mesh.sizes["all"]:
            raise UserError(
                f"trainer.batch_tokens is {batch} for {mesh.sizes['all']} processes: give each a token or more"
            )
        for site, spec in autoencoders.values():
            if site not in stream.sites:
                raise UserError(
                    f"the stream has no {site}, only {', '.join(map(str, stream.sites))}: name one of these"
                )
            if spec.features < mesh.sizes["features"]:
                raise UserError(
                    f"{spec.features} features cannot be dealt over {mesh.sizes['features']} shards: lower "
                    "trainer.feature_shards"
                )
        self.members = [
            TrainingSae(name, site, spec, recipe, mesh, hidden=stream.hidden, device=device)
            for name, (site, spec) in autoencoders.items()
        ]
        self.clock = Phases(device)
        self.step, self.seconds, self.began = 0, 0.0, 0.0
        self.saved_at: int | None = None
        self._problem: str | None = None

    def train(self, *, resume: bool, stop_at: int | None, show: bool) -> list[Trained] | None:
        steps, batch = self.trainer.steps, self.trainer.batch_tokens
        if not (resume and self._load_newest()):
            try:
                self._start()
            except _Ended:
                raise UserError(
                    f"the activations ended before training began, with trainer.start_tokens {self.trainer.start_tokens}: "
                    "give more activations, or set it lower"
                ) from None
        if self.run is not None:
            self.run.forget_after(self.step, but="/result/")
        end = steps if stop_at is None else min(stop_at, steps)
        show = show and self.mesh.is_main
        self.began = self.seconds
        with progress(steps * batch, label="sae", unit="tokens", done=self.step * batch, enabled=show) as advance:
            out_of_time = False
            while self.step < end and not out_of_time:
                shown = self._one_step()
                advance(batch, **_few(shown, self.members))
                out_of_time = self._milestones(shown)
        if self.saved_at != self.step:
            self._save()  # before the export, which may meet a full disk
        results = self._results() if self.step == steps else None
        self.mesh.agree(self._problem)
        return results

    def _start(self) -> None:
        """Pre-bias and normalizer from the first batches, which are not trained on; the sparse backends."""
        samples = self._sample(self.trainer.start_tokens)
        for member in self.members:
            member.start_from(samples[member.site])
        self._agreed_backends()
        for member in self.members if self.trainer.rescale else ():
            member.rescale(samples[member.site][: self.trainer.batch_tokens])

    def _agreed_backends(self) -> None:
        order: tuple[Backend, ...] = ("cpu", "torch", "dense")
        for member in self.members:
            choice = torch.tensor(order.index(member.measured_backend()), device=self.device)
            member.backend = order[int(self.mesh.gather(choice, "all", "backend")[0])]

    def _sample(self, tokens: int) -> dict[Site, Tensor]:
        """The next batches as a whole, at least so many tokens, the same on every process, in order."""
        batch = self.trainer.batch_tokens
        parts: dict[Site, list[Tensor]] = {member.site: [] for member in self.members}
        for _ in range(-(-tokens // batch)):
            rows = self._next_rows()
            for site, own in parts.items():
                own.append(self.mesh.whole_batch(rows[site], batch))
        return {site: torch.cat(own) for site, own in parts.items()}

    def _next_rows(self) -> dict[Site, Tensor]:
        """The next batch's rows that this process harvested, checked on every process. One collective."""
        batch, world = self.trainer.batch_tokens, self.mesh.sizes["all"]
        rows: dict[Site, Tensor] = {}
        problem, ended = self._problem, False
        try:
            harvested = next(self.stream)
            rows = {member.site: harvested[member.site].to(self.device, torch.float32) for member in self.members}
            own = (batch - self.mesh.stream_rank + world - 1) // world
            for site, values in rows.items():
                if values.shape != (own, self.stream.hidden):
                    problem = problem or (
                        f"the stream gave {tuple(values.shape)} at {site}, not {(own, self.stream.hidden)}: check it"
                    )
                elif not bool((values / self._smallest_scale(site)).isfinite().all()):
                    problem = problem or (
                        f"the activations of {site} hold NaN, infinity or numbers beyond float32 in the batch after step "
                        f"{self.step}: leave those tokens out, or load the model in bfloat16 or float32"
                    )
        except StopIteration:
            ended = True
        except UserError as error:
            problem = problem or str(error)
        flags = torch.tensor([int(ended), int(problem is not None)], device=self.device)
        ends, problems = self.mesh.sum_(flags, "all", "ready").tolist()
        if problems:
            self.mesh.agree(problem)
        if ends:
            raise _Ended
        return rows

    def _in_model(self) -> float:
        """Seconds that the stream has spent in the language model; 0 where there is none."""
        return float(getattr(self.stream, "forward_seconds", 0.0))

    def _smallest_scale(self, site: Site) -> float:
        """What activations are divided by at most; 1 before training has begun."""
        scales = [member.scale for member in self.members if member.site == site]
        return min((scale for scale in scales if not math.isnan(scale)), default=1.0)

    def _one_step(self) -> dict[str, float]:
        started = time.perf_counter()
        batch = self.trainer.batch_tokens
        self.clock.begin(on=(self.step + 1) % self.trainer.log_every == 0)
        before = self._in_model()
        try:
            with self.clock.phase("harvest"):
                rows = {site: self.mesh.share_rows(own, batch) for site, own in self._next_rows().items()}
        except _Ended:
            if not self.step:
                raise UserError(
                    f"the activations ended before the first step, after {self.trainer.start_tokens} tokens to start from: give "
                    "more, or set trainer.start_tokens lower"
                ) from None
            if self.saved_at != self.step:
                self._save()
            raise UserError(
                f"the activations ended after {self.step} of {self.trainer.steps} steps: the same with trainer.steps "
                f"{self.step} and resume true makes autoencoders of what was trained; to train longer begin anew, and read them "
                "again and again (epochs: null)"
            ) from None
        self.clock.move(self._in_model() - before, "harvest", "forward")
        factor = learning_rate(self.step, self.trainer.steps, warmup=self.trainer.warmup, decay=self.trainer.decay)
        shown: dict[str, float] = {}
        for member in self.members:
            facts = train_step(
                member, rows[member.site], step=self.step, rate=member.spec.rate * factor, clock=self.clock
            )
            shown |= {f"{member.name}/{name}": value for name, value in facts.items()}
        self.step += 1
        for member in self.members:
            fitted = member.law.fitted
            member.law.refit(self.step, member.firings)
            if member.law.fitted is not fitted:
                checkpoints.refresh_totals(member)
        self.seconds += time.perf_counter() - started
        return shown

    def _milestones(self, shown: dict[str, float]) -> bool:
        """The log, evaluations and checkpoints that are due; True if the time is over."""
        step, trainer = self.step, self.trainer
        if step % trainer.log_every == 0 or step == trainer.steps:
            times = {f"ms/{phase}": value for phase, value in self.clock.take().items()}
            speed = {"tokens_per_second": trainer.batch_tokens * step / max(self.seconds, 1e-9)}
            fits = {
                f"{member.name}/zipf_{name}": float(member.law.fitted[name])
                for member in self.members
                if member.law.fitted is not None
                for name in ("alpha", "beta", "r_squared")
            }
            self._write(shown | fits | speed | times)
        if trainer.evaluate_every is not None and self.held_out and step % trainer.evaluate_every == 0:
            for member in self.members:
                measures, _ = evaluate(member, member.named(), running_threshold(member), self.held_out[member.site])
                self._write({f"{member.name}/held_out/{name}": value for name, value in measures.items()})
        out_of_time = False
        if trainer.max_seconds is not None:
            out_of_time = bool(
                self.mesh.gather(torch.tensor([self.seconds - self.began], device=self.device), "all", "time")[0]
                >= trainer.max_seconds
            )
        if step % trainer.save_every == 0 and step < trainer.steps and not out_of_time:
            self._save()
        return out_of_time

    def _write(self, values: dict[str, float]) -> None:
        if self.run is not None and self.mesh.is_main:
            try:
                self.run.log(self.step, values)
            except UserError as error:  # said by all processes together, when they next agree
                self._problem = str(error)
        if self.report is not None:
            self.report(self.step, values)

    def _results(self) -> list[Trained]:
        samples = {site: values.to(self.device) for site, values in self.sample.items()}
        if not samples and needs_calibration(self.trainer, [member.spec for member in self.members]):
            try:
                samples = self._sample(self.trainer.calibrate_tokens)
            except _Ended:
                if self.mesh.is_main:
                    warnings.warn(
                        "the activations ended before thresholds were calibrated: the running averages are exported, and L0 "
                        "may be far from k; hold tokens out, or give more activations",
                        stacklevel=2,
                    )
        sampled_from = "held_out" if self.sample else "training"
        results = [
            finished(member, samples.get(member.site), self.held_out.get(member.site), sampled_from=sampled_from)
            for member in self.members
        ]
        for result in results:
            if result.measures:
                self._write({f"{result.name}/result/{name}": value for name, value in result.measures.items()})
        return results

    def _save(self) -> None:
        if self.run is not None:
            checkpoints.save(self.run, self.mesh, self.members, self.stream, step=self.step, seconds=self.seconds)
            self.saved_at = self.step

    def _load_newest(self) -> bool:
        facts = checkpoints.load_newest(self.run, self.mesh, self.members, self.stream) if self.run else None
        if facts is not None:
            self.step, self.seconds = facts["step"], facts["seconds"]
            self.saved_at = self.step
        return facts is not None


@contextmanager
def _products(precision: Precision) -> Iterator[None]:
    """How torch multiplies float32 matrices, for as long as training lasts."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Ended(Exception):
    """The stream has no further batch."""


def _few(shown: dict[str, float], members: list[TrainingSae]) -> dict[str, float]:
    """What stands beside the bar: of one autoencoder its error and L0, of several the errors of the first three."""
    if len(members) == 1:
        return {name: shown[f"{members[0].name}/{name}"] for name in ("nmse", "l0", "dead")}
    return {f"nmse {member.name}": shown[f"{member.name}/nmse"] for member in members[:3]}
