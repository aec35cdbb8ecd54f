"""How benchmarks/sae_claims.py scores an exported autoencoder: token by token, at the same L0 for all, on new tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import SparseAutoencoder, ZipfLaw
from sae.metrics import Reconstruction, Usage, decoder_cosines
from sae.sharding import kth_largest

ALPHA, BETA, TAU = 1.0, 2.7, 0.1
"""The law that `under_used` is about, the same for all, and the share of it below which a feature is under-used."""


@torch.no_grad()
def matched(model: SparseAutoencoder, sample: Tensor) -> tuple[SparseAutoencoder, float]:
    """The autoencoder with all thresholds scaled by one factor, which is returned too, so that k features a token are active
    on a (tokens, hidden) sample. TopK stays as it is."""
    if model.config.choice == "token":
        return model, 1.0
    threshold = model.threshold.clamp(min=1e-30)

    def ratios() -> Iterator[Tensor]:
        for part in torch.split(sample, 1024):
            yield (model.affinity(part) / threshold).float()

    found = kth_largest(ratios, model.config.k * len(sample))
    factor = 1.0 if found is None else float(torch.nextafter(found.value, found.value.new_zeros(())))
    scaled = copy.deepcopy(model)
    scaled.set_threshold(model.threshold * factor)
    return scaled.eval(), factor


class Seen:
    """What an autoencoder in evaluation mode does with some tokens."""

    def __init__(self, model: SparseAutoencoder) -> None:
        self.model = model
        self.usage = Usage.start(model.config.features)
        self.reconstruction = Reconstruction.start(model.config.hidden)

    @torch.no_grad()
    def code(self, x: Tensor) -> Any:
        """The code of (tokens, hidden), which is counted."""
        code = self.model.encode(x)
        self.usage = self.usage.update(code)
        self.reconstruction = self.reconstruction.update(x, self.model.decode(code, x))
        return code

    def result(self) -> dict[str, float]:
        """The figures; see docs/sae_claims.md."""
        config = self.model.config
        law = ZipfLaw(features=config.features, k=config.k, alpha=ALPHA, beta=BETA)
        read = self.usage.result(expected=law.densities(), tau=TAU)
        assert read.under_used_share is not None
        return {
            "scored_tokens": read.tokens,
            "dead_exported": read.dead_share,
            "under_used": read.under_used_share,
            "l0_exported": read.l0,
            "fvu_exported": self.reconstruction.result().fvu,
            "c_dec": decoder_cosines(self.model.w_dec).c_dec,
        }


def in_training(run: Path, name: str) -> dict[str, float]:
    """The dead share in the last window of training, and the share of logged steps in which the auxiliary loss was at work."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    dead = [entry[f"{name}/dead"] for entry in entries if f"{name}/dead" in entry]
    aux = [entry[f"{name}/aux"] for entry in entries if f"{name}/aux" in entry]
    return {"dead_training": dead[-1], "aux_at_work": sum(value > 0 for value in aux) / len(aux)}
