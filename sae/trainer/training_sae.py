"""One autoencoder in training: its weights (or a shard of them), moments, counters, thresholds, and its forward pass.

It sees activations, not where they come from. What a training step does with it is in `step`, the loop in `loop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lm.anatomy import Site
from sae.auxiliary import under_use
from sae.dead_features import Firings
from sae.gao_recipe import geometric_median, input_variance
from sae.kernels import Backend, Choose, Splits, choose_backend, encode_decode
from sae.model import SparseAutoencoder
from sae.model_config import SparseAutoencoderConfig
from sae.moving_average import MovingAverage
from sae.sharding import Mesh, copy_to_shards, sum_of_shards
from sae.sparse_code import SparseCode, decode
from sae.thresholds import RunningThreshold
from sae.trainer.config import AutoencoderSpec, AuxiliarySpec, TrainerConfig, ZipfSpec
from sae.trainer.timing import Phases
from sae.trainer.training_choice import TrainingChoice
from sae.trainer.zipf_fit import Law, moved

WEIGHTS = ("w_enc", "b_enc", "w_dec", "b_dec")
SHARDED = ("w_enc", "b_enc", "w_dec")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all autoencoders of a run have in common."""

    trainer: TrainerConfig
    auxiliary: AuxiliarySpec
    zipf: ZipfSpec


class Forward(NamedTuple):
    """What a forward pass gives; hats are whole (over all feature shards), in units of `scale`."""

    code: SparseCode
    """Of the own features."""
    x_hat: Tensor
    wider_hat: Tensor | None
    aux_hat: Tensor | None
    """Without `b_dec`."""


class TrainingSae:
    """One autoencoder at one site, on one process of the mesh. Weights are in units of `scale`."""

    def __init__(
        self,
        name: str,
        site: Site,
        spec: AutoencoderSpec,
        recipe: Recipe,
        mesh: Mesh,
        *,
        hidden: int,
        device: torch.device,
    ) -> None:
        self.name, self.site, self.spec, self.recipe, self.mesh = name, site, spec, recipe, mesh
        self.config = SparseAutoencoderConfig(
            hidden=hidden, features=spec.features, k=spec.k, choice=spec.choice, seed=spec.seed
        )
        trainer = recipe.trainer
        model = SparseAutoencoder(self.config)  # whole, so that any number of shards starts from the same numbers
        self.weights = nn.ParameterDict(
            {name: nn.Parameter(mesh.own_features(getattr(model, name).data).clone().to(device)) for name in SHARDED}
        )
        self.weights["b_dec"] = nn.Parameter(model.b_dec.data.to(device))
        del model
        own = len(self.weights["b_enc"])
        fused = device.type in ("cpu", "cuda")
        self.adam = torch.optim.Adam(
            self.parameters(),
            lr=spec.rate,
            betas=trainer.betas,
            eps=trainer.eps,
            fused=fused,
            foreach=None if fused else True,
        )
        self.firings = moved(Firings.start(own), device)
        self.threshold = RunningThreshold.start(own if spec.choice == "feature" else None)
        self.law = Law(spec, recipe.zipf, mesh, batch=trainer.batch_tokens, steps=trainer.steps, device=device)
        self.average = MovingAverage.start(self.named(), decay=trainer.ema) if trainer.ema is not None else None
        self.scale = self.variance = math.nan
        """What activations are divided by, and their variance before."""
        self.backend: Backend = "torch"
        self.last: float | None = None
        """The smallest activation that mutual choice last took: a guess for the next batch, of no other effect."""
        self.idle_total = 0
        self.dead_total = 0

    def parameters(self) -> list[nn.Parameter]:
        """In the order of `WEIGHTS`."""
        return [cast(nn.Parameter, self.weights[name]) for name in WEIGHTS]

    def named(self) -> dict[str, Tensor]:
        """The weights held here."""
        return {name: self.weights[name].data for name in WEIGHTS}

    def start_from(self, sample: Tensor) -> None:
        """Pre-bias, normalizer and scale from a (tokens, hidden) sample, the same on every process."""
        self.variance = input_variance(sample)
        self.scale = math.sqrt(self.variance) if self.recipe.trainer.scale else 1.0
        self.weights["b_dec"].data.copy_(geometric_median(sample) / self.scale)

    @torch.no_grad()
    def rescale(self, batch: Tensor) -> None:
        """Multiply the encoder by what makes the first reconstruction of a global batch best; no choice changes by it."""
        x = batch[self.mesh.global_rows(len(batch), batch.device)] / self.scale
        choose = self.selecting(0, None)
        output = self.forward(x, choose, splits=choose.splits, inner=lambda: choose.inner)
        moved_by = output.x_hat - self.weights["b_dec"]
        sums = torch.stack([(moved_by * (x - self.weights["b_dec"])).double().sum(), moved_by.double().square().sum()])
        along, square = self.mesh.sum_(sums, "data", "start").tolist()
        if along > 0:
            self.weights["w_enc"].data.mul_(along / square)

    def measured_backend(self) -> Backend:
        """What "auto" means here, for shapes like those of a step."""
        named = self.recipe.trainer.backend
        if named != "auto":
            return named
        w_enc = self.weights["w_enc"]
        tokens = self.mesh.rows(self.recipe.trainer.batch_tokens)
        return choose_backend(
            tokens=tokens,
            hidden=w_enc.shape[1],
            features=w_enc.shape[0],
            matches=self.spec.k * tokens // self.mesh.sizes["features"],
            dtype=self.compute_dtype,
            device=w_enc.device,
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.recipe.trainer.precision == "bfloat16" else torch.float32

    def idle(self) -> tuple[Tensor, Tensor]:
        """((own features,) boolean that the auxiliary loss would bring back, (own features,) by how much)."""
        dead = self.firings.dead(window=self.recipe.auxiliary.window)
        tau = self.recipe.auxiliary.tau
        if self.spec.loss == "aux_k" or self.law.expected is None or tau == 0:
            return dead, dead.float()
        use = under_use(self.firings.density(), self.law.expected, tau=tau)
        use = torch.where(dead, 1.0, use)  # it generalizes aux_k: the dead are always among them
        return use > 0, use.float()

    @property
    def dead_in_training(self) -> float:
        """The share of all features that did not fire in the last window of tokens, or in all that were trained on. One
        collective."""
        firings = self.firings
        silent = firings.silent >= min(self.recipe.auxiliary.window + 1, max(firings.tokens, 1))
        return float(self.mesh.sum_(silent.sum(), "features", "dead")) / self.spec.features

    def selecting(self, step: int, clock: Phases | None) -> TrainingChoice:
        """The choice of the training step number `step`, from 0."""
        aux = self.recipe.auxiliary
        mutual = self.spec.choice == "feature" and step < self.law.mutual_steps
        used = self.spec.loss != "none" and aux.coefficient > 0 and self.idle_total > 0
        idle, use = self.idle() if used else (None, None)
        return TrainingChoice(
            mesh=self.mesh,
            choice="mutual" if mutual else self.spec.choice,
            k=self.spec.k,
            features=self.spec.features,
            batch=self.recipe.trainer.batch_tokens,
            budgets=self.law.own_budgets(step) if self.spec.choice == "feature" and not mutual else None,
            idle=idle,
            k_aux=min(aux.k_aux, self.spec.features),
            share=use if aux.weighting == "gradient" and self.spec.loss == "aux_zipf" else None,
            wider=self.spec.multi_topk,
            guess=self.last if self.mesh.sizes["all"] > 1 else None,
            demand=self.law.due(step),
            clock=clock,
        )

    def forward(
        self,
        x: Tensor,
        choose: Choose,
        weights: Mapping[str, Tensor] | None = None,
        *,
        splits: Splits | None = None,
        inner: Callable[[], Tensor | None] = lambda: None,
        clock: Phases | None = None,
        dtype: torch.dtype | None = None,
    ) -> Forward:
        """Own rows x (rows, hidden) in units of `scale`, through these weights (or those in training), in the precision of
        training or another."""
        used = self.weights if weights is None else weights
        dtype = dtype or self.compute_dtype
        b_dec = copy_to_shards(used["b_dec"], self.mesh, "pre-bias gradient")
        if clock is not None:
            clock.start()
        encoded = encode_decode(
            x,
            used["w_enc"].to(dtype),
            used["b_enc"].to(dtype),
            used["w_dec"].to(dtype),
            b_dec.to(dtype),
            choose,
            backend=self.backend,
            features_first=self.spec.choice == "feature",
            splits=splits,
        )
        hats, code = [encoded.x_hat.float()], encoded.code
        if (mask := inner()) is not None:
            code = code.keep(mask)
            hats.append(decode(code, used["w_dec"].to(dtype)).float())
        if encoded.aux_hat is not None:
            hats.append(encoded.aux_hat.float())
        if self.mesh.sizes["features"] > 1:
            hats = [*sum_of_shards(torch.stack(hats), self.mesh, "reconstruction")]
        if clock is not None:
            clock.stop("decode")
        aux_hat = hats.pop() if encoded.aux_hat is not None else None
        whole = [hat + used["b_dec"] for hat in hats]
        return Forward(code, whole[-1], whole[0] if len(whole) > 1 else None, aux_hat)
