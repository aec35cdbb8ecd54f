"""One experiment with autoencoders as data: which activations, which autoencoders, how they are trained, where they go."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lm.anatomy import Site
from lm.errors import UserError
from lm.model import ModelSpec
from sae.activations import (
    BufferSpec,
    Builtin,
    HarvestSpec,
    NoSource,
    ReadSpec,
    Source,
    TextSource,
    parse_site,
    require_different,
    site_name,
)
from sae.model_config import Choice
from sae.synthetic import Synthetic  # noqa: F401 - a source that a config may name

AuxiliaryLoss = Literal["none", "aux_k", "aux_zipf"]
Precision = Literal["float32", "tf32", "bfloat16"]
Backend = Literal["auto", "cpu", "torch", "dense"]
HELP = """Look inside: train sparse autoencoders on the activations of a language model.

palimpsest train-sae --config builtin --out runs/sae
accelerate launch --config_file "$(palimpsest configs accelerate/cpu2_ddp)" -m palimpsest train-sae --config builtin
"""


_OF_RUNS = {".json", ".jsonl", ".yaml", ".txt"}
"""What the files of a run folder end in, which stand beside the autoencoders' folders."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderSpec:
    """One autoencoder; it is trained at every site."""

    choice: Choice = "token"
    """Token choice (TopK), feature choice or mutual choice (BatchTopK)."""
    features: int = 4096
    """Width of the dictionary."""
    k: int = 32
    """Mean number of active features a token."""
    seed: int = 0
    """Of the decoder's random directions."""
    learning_rate: float | None = None
    """Peak rate; null: 2e-4 / sqrt(features / 16384), the rule of Gao et al."""
    auxiliary: AuxiliaryLoss | None = None
    """What brings unused features back; null: aux_k for token choice, aux_zipf for the two others."""
    multi_topk: bool = False
    """Train the reconstruction with four times the budget too, with weight 1/8."""
    name: str | None = None
    """Of its folder; null: made of the settings."""

    def __post_init__(self) -> None:
        if self.features < 1 or not 1 <= self.k <= self.features:
            raise UserError(
                f"autoencoders.k is {self.k} of {self.features} features: give k from 1 to the number of features"
            )
        for setting, kind in (("choice", Choice), ("auxiliary", AuxiliaryLoss)):
            value = getattr(self, setting)
            if value not in get_args(kind) and not (setting == "auxiliary" and value is None):
                raise UserError(f"autoencoders.{setting} is {value!r}: use one of {', '.join(get_args(kind))}")
        if not isinstance(self.multi_topk, bool):
            raise UserError(f"autoencoders.multi_topk is {self.multi_topk!r}: use true or false")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UserError(f"autoencoders.learning_rate is {self.learning_rate}: give a positive rate, or null")
        if self.name is not None and (not self.name or set("/\\") & set(self.name) or self.name.startswith(".")):
            raise UserError(f"autoencoders.name is {self.name!r}: give a plain folder name")
        if self.name is not None and (self.name == "checkpoints" or Path(self.name).suffix in _OF_RUNS):
            raise UserError(f"autoencoders.name is {self.name!r}, as the run's own files are called: give another name")

    @property
    def loss(self) -> AuxiliaryLoss:
        return self.auxiliary or ("aux_k" if self.choice == "token" else "aux_zipf")

    @property
    def rate(self) -> float:
        return self.learning_rate or 2e-4 / math.sqrt(self.features / 2**14)


@dataclass(frozen=True, kw_only=True)
class AuxiliarySpec:
    """The auxiliary losses, for all autoencoders."""

    coefficient: float = 1 / 32
    """Their weight beside the normalized error."""
    k_aux: int = 256
    """Features a token that model the residual."""
    window: int = 10_000_000
    """Tokens: a feature silent for longer is dead; densities are averaged over as many."""
    tau: float = 0.1
    """aux_zipf: a feature below this share of its expected density is under-used. Ours; larger ones draw in most features, which
    then learn to leave room for `k_aux` others and lose where large activations are chosen."""
    weighting: Literal["set", "gradient"] = "set"
    """aux_zipf: all under-used features alike, or their encoder gradients scaled by how under-used they are."""
    scale_by_count: bool = False
    """Multiply by min(idle features / k_aux, 1), as sparsify and SAELens do."""

    def __post_init__(self) -> None:
        if self.coefficient < 0 or self.k_aux < 1 or self.window < 1 or not 0 <= self.tau <= 1:
            raise UserError(
                f"auxiliary settings {self.coefficient}, {self.k_aux}, {self.window}, {self.tau}: give a coefficient from "
                "0, k_aux and window from 1, tau from 0 to 1"
            )


@dataclass(frozen=True, kw_only=True)
class ZipfSpec:
    """The law of densities: what feature choice takes its budgets from, and aux_zipf its expectations."""

    expected: Literal["fixed", "fitted"] = "fixed"
    """What aux_zipf expects of a feature at its rank: a law with `alpha` and `beta`, or one fitted every `fit_every` steps to
    the autoencoder's own densities. The second feeds on itself: where features begin to die, the law fitted to what is left
    falls off faster, and so expects them to."""

    budgets: Literal["zipf", "uniform"] = "zipf"
    """Of feature choice."""
    mutual_share: float = 0.1
    """Share of the steps, at the start, in which feature choice selects by mutual choice, so that there is something to
    fit. Afterwards demand goes on being measured as what mutual choice would take."""
    measure_every: int = 8
    """Steps between two measurements of demand."""
    fit_every: int = 500
    """Steps between two fits."""
    window: int = 1_000_000
    """Tokens over which demand is averaged."""
    low_end: float = 0.2
    """Share of the live features, the rarest, that the fit leaves out."""
    max_shift: float = 100.0
    """Largest shift of the rank that a fit may have; early in training densities fall off too late for any Zipf law."""
    least_firings: int = 10
    """Features that fired less often in the window count as dead for the fit."""
    alpha: float = 1.0
    """Exponent of the fixed law, and of the budgets until the first fit."""
    beta: float = 2.7
    """Its shift."""
    rare: Literal["carry", "floor", "refuse"] = "carry"
    """If the rarest feature is due less than one token a batch: carry budgets over batches (at most 64, else floor), give
    it one token anyway, or refuse."""

    def __post_init__(self) -> None:
        if not 0 <= self.mutual_share < 1 or min(self.measure_every, self.fit_every, self.window) < 1:
            raise UserError(
                f"zipf.mutual_share is {self.mutual_share}, measure_every {self.measure_every}, fit_every "
                f"{self.fit_every}, window {self.window}: give a share below 1 and whole numbers from 1"
            )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How the loop runs. The defaults are those of Gao et al.'s released code where it has them."""

    steps: int = 10_000
    """Optimizer steps."""
    batch_tokens: int = 4096
    """Tokens of the global batch, over all processes."""
    warmup: int = 100
    """Steps over which the learning rate rises."""
    decay: float = 0.2
    """Share of the steps, at the end, over which the rate falls linearly to 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's."""
    eps: float = 6.25e-10
    """Adam's."""
    clip: float | None = None
    """Largest gradient norm of one autoencoder; null for none."""
    ema: float | None = None
    """Decay of an average of the weights, which is then the result; null for none."""
    precision: Precision = "float32"
    """Of the matrix products. Weights, moments, losses and statistics are float32 anyway. tf32: inputs of products are
    rounded where the GPU is faster so, results and the selection are float32. bfloat16: affinities are too, and are compared
    as they are, ties cut by index."""
    scale: bool = True
    """Divide activations by their root mean square about the mean, so that rates mean the same for every model. The
    result is for activations as they are."""
    start_tokens: int = 32_768
    """Tokens, at least one batch, from which pre-bias and normalizer are taken. They are not trained on."""
    rescale: bool = True
    """Scale the encoder at the start so that the first reconstructions are as near as their directions allow. (Gao et al.
    scale it too, by random vectors.) Without it mutual choice starts worse than predicting the mean."""
    thresholds: Literal["calibrated", "running"] = "calibrated"
    """Of the result: set on a sample after the last step, or the running average."""
    calibrate_on: Literal["held_out", "training"] = "held_out"
    """The sample: held-out tokens, the first ones, which are then not scored; or the next training tokens, which also serve
    where nothing is held out. What was trained on many times fires more than new text, so thresholds from it keep too little."""
    calibrate_tokens: int = 32_768
    """Tokens of the sample; of held-out text that has too few for both, half."""
    threshold_rate: float = 0.01
    """Of the running average."""
    feature_shards: int = 1
    """Processes over which each autoencoder's features are dealt; the others share the batch."""
    backend: Backend = "auto"
    """Of the sparse operations: the cheapest as measured at the start (and kept when a run goes on), or a named one."""
    save_every: int = 1000
    """Steps between checkpoints to resume from."""
    log_every: int = 10
    """Steps between lines in the metric log."""
    evaluate_every: int | None = None
    """Steps between evaluations on held-out tokens; null: at the end only."""
    held_out_tokens: int = 16_384
    """Held-out tokens."""
    recovered_contexts: int = 0
    """Held-out contexts on which the results replace the model's own activations at the end, for the cross-entropy recovered;
    0 for none. Needs held-out text."""
    max_seconds: float | None = None
    """Stop, with a checkpoint, after this much training time of one start; with resume it goes on for as long again."""

    def __post_init__(self) -> None:
        whole = (
            "steps",
            "batch_tokens",
            "start_tokens",
            "calibrate_tokens",
            "feature_shards",
            "save_every",
            "log_every",
        )
        for name in (*whole, "evaluate_every", "held_out_tokens", "max_seconds", "clip"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"trainer.{name} is {value}: give a positive number")
        if self.recovered_contexts < 0:
            raise UserError(f"trainer.recovered_contexts is {self.recovered_contexts}: give a number of contexts, or 0")
        if self.warmup < 0 or not 0 <= self.decay <= 1:
            raise UserError(f"trainer.warmup is {self.warmup} and decay {self.decay}: give steps from 0, and a share")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"trainer.ema is {self.ema}: give a decay between 0 and 1, 0.999 is usual, or null")
        if self.ema is not None and self.thresholds == "running":
            raise UserError(
                "trainer.thresholds is running, which are those of the weights in training, and trainer.ema asks "
                "for averaged ones: use calibrated"
            )
        if not all(0 <= beta < 1 for beta in self.betas) or not 0 < self.eps < math.inf:
            raise UserError(
                f"trainer.betas is {self.betas} and eps {self.eps}: give two betas from 0 to below 1, and eps above 0"
            )
        if not 0 < self.threshold_rate <= 1:
            raise UserError(f"trainer.threshold_rate is {self.threshold_rate}: give a share above 0 and up to 1")


@dataclass(frozen=True, kw_only=True)
class TrainSaeConfig:
    """Which activations of which model, which autoencoders, and where they go: `<out>/<name>`."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The language model; not loaded where activations come from files and nothing is harvested."""
    source: Source = field(default_factory=Builtin)
    """Where training activations come from."""
    held_out: Source | None = None
    """Where the tokens for evaluation come from; NoSource for none. Null: what no built-in model saw, where a built-in model is
    trained on the built-in world's rows; none of any other model or text, whose thresholds are then set on training tokens."""
    sites: tuple[str, ...] = ("resid.3",)
    """Sites of the model, such as resid.3, mlp.3 or attn.3."""
    harvest: HarvestSpec = field(default_factory=HarvestSpec)
    """How text becomes activations."""
    buffer: BufferSpec = field(default_factory=BufferSpec)
    """The shuffling buffer for text."""
    reading: ReadSpec = field(default_factory=ReadSpec)
    """How files of activations are read."""
    autoencoders: tuple[AutoencoderSpec, ...] = (AutoencoderSpec(),)
    """The autoencoders; each is trained at every site, from the same activations."""
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    """Settings of the autoencoders that are crossed with them, e.g. {k: [16, 32], seed: [0, 1]}."""
    auxiliary: AuxiliarySpec = field(default_factory=AuxiliarySpec)
    """The auxiliary losses."""
    zipf: ZipfSpec = field(default_factory=ZipfSpec)
    """Budgets and expected densities."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """How the loop runs."""
    out: str = "runs/sae"
    """The run folder."""
    trackers: tuple[str, ...] = ()
    """Also log to these through accelerate, e.g. ["tensorboard"]."""
    resume: bool = False
    """Go on with the run in `out`, from its newest checkpoint."""

    def __post_init__(self) -> None:
        if isinstance(self.source, NoSource):
            raise UserError("source is NoSource: there would be nothing to train on; name one")
        if self.trainer.evaluate_every is not None and isinstance(self.held_out_source, NoSource):
            raise UserError("trainer.evaluate_every is set but held_out is NoSource: name held-out activations")
        if self.trainer.recovered_contexts and not isinstance(self.held_out_source, TextSource):
            raise UserError(
                f"trainer.recovered_contexts is {self.trainer.recovered_contexts} and held_out "
                f"{type(self.held_out_source).__name__}: cross-entropy needs held-out text; name some, or set it to 0"
            )
        if not self.sites or not self.autoencoders:
            raise UserError("sites and autoencoders are empty: name at least one of each")
        named(crossed(self.autoencoders, self.sweep), [parse_site(site) for site in self.sites])

    @property
    def held_out_source(self) -> Source:
        """`held_out`, or what stands for null."""
        if self.held_out is not None:
            return self.held_out
        seen = ("forget", "retain", "general", "all")
        built_in = self.model.path.startswith("builtin") and self.model.adapter is None
        if built_in and isinstance(self.source, Builtin) and self.source.part in seen:
            return Builtin(part="unseen")
        return NoSource()


def crossed(specs: Sequence[AutoencoderSpec], sweep: dict[str, list[Any]]) -> tuple[AutoencoderSpec, ...]:
    """Every spec with every combination of the sweep's values. Raises UserError for a setting that there is not."""
    known = {setting.name for setting in fields(AutoencoderSpec)} - {"name"}
    for name, values in sweep.items():
        if name not in known or not isinstance(values, list) or not values:
            raise UserError(f"sweep.{name} is {values!r}: give a list for one of {', '.join(sorted(known))}")
    grid = itertools.product(*sweep.values())
    points = [dict(zip(sweep, values, strict=True)) for values in grid]
    try:
        return tuple(replace(spec, **point) for spec in specs for point in points)
    except TypeError as error:
        raise UserError(f"the sweep's values do not fit: {error}") from None


def named(specs: Sequence[AutoencoderSpec], sites: Sequence[Site]) -> dict[str, tuple[Site, AutoencoderSpec]]:
    """Folder name -> (site, autoencoder), every autoencoder at every site. Raises UserError for a name used twice."""
    members: dict[str, tuple[Site, AutoencoderSpec]] = {}
    require_different(sites)
    for site in sites:
        for spec in specs:
            name = f"{spec.choice}-k{spec.k}-f{spec.features}-s{spec.seed}" if spec.name is None else spec.name
            name = name if spec.name is not None and len(sites) == 1 else f"{site_name(site)}-{name}"
            if name in members:
                raise UserError(f"two autoencoders are called {name}: give them a name each (autoencoders.name)")
            members[name] = (site, spec)
    return members
