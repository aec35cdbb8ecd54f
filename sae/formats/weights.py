"""One autoencoder's numbers between a file and the module, and the exact rewritings that make foreign ones fit.

All formats are brought to `Z = rule((x - b_dec) W_enc^T + b_enc)`, `x_hat = Z W_dec + b_dec`. A missing pre-bias, a gate on
decoder norms and a constant scale of the input are folded in (float64, then float32): ReLU, TopK and thresholds all
commute with positive factors, if the *thresholds* are scaled with them, which readers elsewhere have forgotten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lm.errors import UserError
from sae.model_config import InputNorm, Rule, SparseAutoencoderConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """What a file says, in this project's layout: a plain record. `threshold` None is not set; the rule `threshold` needs one."""

    w_enc: Tensor
    """(features, hidden)."""
    b_enc: Tensor
    """(features,)."""
    w_dec: Tensor
    """(features, hidden)."""
    b_dec: Tensor
    """(hidden,)."""
    rule: Rule
    k: int = 0
    threshold: Tensor | None = None
    """(features,); infinite where a feature never fires."""
    input_norm: InputNorm = "none"
    seed: int = 0
    variance: float = math.nan
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> SparseAutoencoderConfig:
        """The sizes and the rule. UserError if they cannot be."""
        features, hidden = self.w_enc.shape
        return SparseAutoencoderConfig(
            hidden=hidden, features=features, k=self.k, choice=self.rule, seed=self.seed, input_norm=self.input_norm
        )

    @property
    def is_relu(self) -> bool:
        """Thresholds of 0 everywhere."""
        return self.threshold is not None and not bool(self.threshold.clamp(min=0).any())

    def with_pre_bias(self) -> Weights:
        """For an encoder that reads x itself: `b_enc + W_enc b_dec`, so that it may read `x - b_dec`."""
        return replace(self, b_enc=(self.b_enc.double() + self.w_enc.double() @ self.b_dec.double()).float())

    def folded_pre_bias(self) -> Tensor:
        """The (features,) encoder bias for a reader that does not subtract `b_dec`: the other way round."""
        return (self.b_enc.double() - self.w_enc.double() @ self.b_dec.double()).float()

    def with_decoder_norms(self) -> Weights:
        """For a rule that looks at `z |W_dec,i|`: the norms move from the decoder to the encoder. A zero row stays unused.

        Thresholds are those of the scaled pre-activations already.
        """
        norms = self.w_dec.double().norm(dim=1)
        divide = torch.where(norms > 0, norms, 1.0)
        return replace(
            self,
            w_enc=(self.w_enc.double() * norms.unsqueeze(1)).float(),
            b_enc=(self.b_enc.double() * norms).float(),
            w_dec=(self.w_dec.double() / divide.unsqueeze(1)).float(),
        )

    def with_scale(self, scale: float) -> Weights:
        """For numbers that expect the input times `scale` and give the output times it: biases and thresholds / scale.

        The decoder is unchanged, so that unit rows stay unit rows; activations come out in the input's own units.
        """
        if not 0 < scale < math.inf:
            raise UserError(
                f"the scale {scale} of the activations must be above 0 and finite: see how they were trained"
            )
        if self.input_norm != "none":
            raise UserError(f"a scale of the activations has no effect under {self.input_norm}: leave the scale out")
        return replace(
            self,
            b_enc=(self.b_enc.double() / scale).float(),
            b_dec=(self.b_dec.double() / scale).float(),
            threshold=None if self.threshold is None else self.threshold.double() / scale,
            variance=self.variance / scale**2,
        )
