"""The Zipf law of one autoencoder in training: fitted now and then to measured densities; budgets and expectations by it.

Feature choice takes what its budgets say, so its own densities tell nothing about the law; what is fitted there is
*demand*, what mutual choice would take of the same affinities. For the others it is their own densities. Badge:
**reconstruction** (arXiv 2411.02124 names a Zipf distribution and no more that is known here).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm.errors import UserError
from sae.budgets import ZipfLaw, by_density, carried_budgets, fit_zipf, rescaled, zipf_budgets
from sae.dead_features import Firings
from sae.sharding import Mesh
from sae.trainer.config import AutoencoderSpec, ZipfSpec

CARRIED = 64
"""Batches that budgets are carried over at most."""


class Law:
    """Budgets of feature choice and expected densities for aux_zipf, of the own features of one process."""

    def __init__(
        self, spec: AutoencoderSpec, zipf: ZipfSpec, mesh: Mesh, *, batch: int, steps: int, device: torch.device
    ):
        self.spec, self.zipf, self.mesh, self.batch, self.device = spec, zipf, mesh, batch, device
        start, end = mesh.bounds(spec.features)
        own = end - start
        self.demand = moved(Firings.start(own), device)
        self.fitted: dict[str, Any] | None = None
        """The last fit, as plain numbers."""
        self.expected: Tensor | None = None
        """(own features,) float64, after the first fit."""
        self.budgets: Tensor | None = None
        """(cycle, own features) int64: the budgets of the batches of a cycle."""
        self.mutual_steps = 0
        if spec.choice == "feature":
            law = ZipfLaw(features=spec.features, k=spec.k, alpha=0.0)  # uniform
            if zipf.budgets == "zipf":
                self.mutual_steps = round(zipf.mutual_share * steps)
                law = self._fixed()
            whole = self._by_rank(law)
            self.budgets = mesh.own_features(whole.T).T.contiguous().to(device)

    @property
    def measured(self) -> bool:
        """Whether demand has to be measured apart."""
        return self.spec.choice == "feature" and (self.zipf.budgets == "zipf" or self.spec.loss == "aux_zipf")

    def due(self, step: int) -> bool:
        """Whether demand is measured at this step (counted from 0)."""
        return self.measured and (step < self.mutual_steps or step % self.zipf.measure_every == 0)

    def own_budgets(self, step: int) -> Tensor:
        """(own features,) for the batch of this step, from 0."""
        assert self.budgets is not None
        return self.budgets[step % len(self.budgets)]

    def own_budgets_for(self, tokens: int) -> Tensor:
        """(own features,) for a sample of so many tokens, at the L0 of training. One collective."""
        assert self.budgets is not None
        whole = self.mesh.whole_features(self.budgets.T.contiguous(), self.spec.features, "budgets").T
        return self.mesh.own_features(rescaled(whole, batch=self.batch, to=tokens)).to(self.device)

    def measure(self, counts: Tensor) -> None:
        """After a global batch: the (own features,) matches that mutual choice would take."""
        self.demand = self.demand.add(counts, self.batch, window=self.zipf.window)

    def refit(self, step: int, firings: Firings) -> None:
        """After `step` steps, if it is time. Gathers the densities of all shards: one collective, or two."""
        wanted = self.spec.loss == "aux_zipf" or (self.spec.choice == "feature" and self.zipf.budgets == "zipf")
        if not wanted or (step % self.zipf.fit_every and step != self.mutual_steps):
            return
        if self.spec.loss == "aux_zipf" and self.zipf.expected == "fixed":
            self._expect(self._fixed(), self._whole(firings.density()))
        source = self.demand if self.measured else firings
        density = self._whole(source.density())
        seen = max(source.weight, 1e-300) * (self.zipf.window if self.measured else source.tokens)
        try:
            fit = fit_zipf(
                density.clamp(max=1),
                low_end=self.zipf.low_end,
                least=self.zipf.least_firings / max(seen, 1),
                max_shift=self.zipf.max_shift,
            )
        except (UserError, OverflowError):  # too little is alive, or nothing like a law: what was there before stays
            return
        law = fit.law(self.spec.k)
        names = ("alpha", "beta", "r_squared", "used", "at_bound")
        self.fitted = {**{name: getattr(fit, name) for name in names}, "step": step}
        if self.spec.loss == "aux_zipf" and self.zipf.expected == "fitted":
            self._expect(law, self._whole(firings.density()) if self.measured else density)
        if self.spec.choice == "feature" and self.zipf.budgets == "zipf":
            whole = by_density(self._by_rank(law), density)
            self.budgets = self.mesh.own_features(whole.T).T.contiguous().to(self.device)

    def _fixed(self) -> ZipfLaw:
        return ZipfLaw(features=self.spec.features, k=self.spec.k, alpha=self.zipf.alpha, beta=self.zipf.beta)

    def _expect(self, law: ZipfLaw, density: Tensor) -> None:
        self.expected = self.mesh.own_features(by_density(law.densities(), density)).to(self.device)

    def _whole(self, own: Tensor) -> Tensor:
        return self.mesh.whole_features(own, self.spec.features, "densities").cpu()

    def _by_rank(self, law: ZipfLaw) -> Tensor:
        """(cycle, features) budgets by rank."""
        needed = -(-law.smallest_batch() // self.batch)
        if needed == 1 or self.zipf.rare == "refuse":
            return zipf_budgets(law, batch=self.batch).unsqueeze(0)
        if self.zipf.rare == "floor" or needed > CARRIED:
            return zipf_budgets(law, batch=self.batch, rare="floor").unsqueeze(0)
        return carried_budgets(law, batch=self.batch, micro_batches=needed)


def moved(firings: Firings, device: torch.device) -> Firings:
    """The same counts on a device."""
    return Firings(firings.silent.to(device), firings.rate.to(device), firings.tokens, firings.weight)
