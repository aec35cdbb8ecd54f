"""The autoencoder: its parameters, how it starts, encoding to a `SparseCode`, decoding; and loading and saving it.

Untied weights with the encoder started as the decoder's transpose, unit-norm decoder rows and a pre-bias that is
subtracted before encoding and added after decoding (Gao et al. 2024). The allocation is the only thing that differs
between TopK, feature choice and mutual choice. A fourth rule, fixed thresholds, and a normalization of each token hold
what other tools trained (`sae.formats` reads and writes their files). This is the plain form, with dense pre-activations
under autograd; it trains nothing, talks to no hub and imports no language model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm.errors import UserError
from sae.allocate import by_threshold, feature_choice, mutual_choice, token_choice
from sae.budgets import uniform_budgets
from sae.formats import Format, Weights, read_weights, write_weights
from sae.gao_recipe import geometric_median, input_variance, unit_rows, without_parallel
from sae.model_config import SparseAutoencoderConfig
from sae.sparse_code import SparseCode, decode


class SparseAutoencoder(nn.Module):
    """`Z = choose((x - b_dec) W_enc^T + b_enc)`, `x_hat = Z W_dec + b_dec`. Badge: **faithful** to Gao et al.'s model.

    Parameters in float32: `w_enc` and `w_dec` (features, hidden), `b_enc` (features,), `b_dec` (hidden,). Buffers:
    `threshold` (features,) float64, NaN until `set_threshold`, and `variance`, NaN until `start_from`.
    """

    threshold: Tensor
    variance: Tensor
    metadata: dict[str, Any]
    """Where it comes from, as a file said: model, hook name, data. Written again by `save_pretrained`; not a weight."""

    def __init__(self, config: SparseAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.metadata = {}
        generator = torch.Generator().manual_seed(config.seed)
        directions = unit_rows(torch.randn(config.features, config.hidden, generator=generator))
        self.w_dec = nn.Parameter(directions)
        self.w_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.features))
        self.b_dec = nn.Parameter(torch.zeros(config.hidden))
        self.register_buffer("threshold", torch.full((config.features,), torch.nan, dtype=torch.float64))
        self.register_buffer("variance", torch.tensor(torch.nan, dtype=torch.float64))

    def __repr__(self) -> str:
        """Kind, sizes and, where it is known, the site: `SparseAutoencoder(mutual choice, 1024 features, …, at resid.4)`."""
        rule = "thresholds" if self.config.choice == "threshold" else f"{self.config.choice} choice"
        k = "" if self.config.choice == "threshold" else f", k {self.config.k}"
        site = self.metadata.get("site") or self.metadata.get("hook_name")
        where = f", at {site}" if site else ""
        return f"SparseAutoencoder({rule}, {self.config.features} features, hidden {self.config.hidden}{k}{where})"

    @torch.no_grad()
    def start_from(self, sample: Tensor) -> None:
        """Set the pre-bias to the geometric median of a (tokens, hidden) sample, and the loss's normalizer, once."""
        inner = self._normalized(self._rows(sample))[0]
        self.variance.fill_(input_variance(inner))
        self.b_dec.copy_(geometric_median(inner))

    def affinity(self, x: Tensor) -> Tensor:
        """(tokens, features) pre-activations in float32, of x (tokens, hidden), whatever the autocast.

        Feature choice computes them as (features, tokens) in memory, the layout its selection is fast in.
        """
        with torch.autocast(x.device.type, enabled=False):
            w_enc, b_enc = self.w_enc.float(), self.b_enc.float()  # the same tensors, but after .bfloat16() or .half()
            centered = self._normalized(self._rows(x).float())[0] - self.b_dec.float()
            if self.config.choice == "feature":
                return torch.addmm(b_enc.unsqueeze(1), w_enc, centered.T).T
            return torch.addmm(b_enc, centered, w_enc.T)

    def encode(self, x: Tensor, *, budgets: Tensor | None = None) -> SparseCode:
        """The code of x (tokens, hidden). In training the allocation over this batch, else what no batch can change.

        Training: k a token, k x tokens in all, or `budgets` (features,) for feature choice (uniform if not given); x is
        then the whole global batch. Evaluation: k a token for token choice, else the thresholds, which must be set.
        """
        if budgets is not None and (self.config.choice != "feature" or not self.training):
            raise UserError("budgets are for feature choice in training: leave them out, or call train() first")
        affinity, k = self.affinity(x), self.config.k
        if self.config.choice == "token":
            return token_choice(affinity, k)
        if not self.training or self.config.choice == "threshold":
            self._needs_threshold("encode outside training")
            return by_threshold(affinity, self.threshold)
        if self.config.choice == "mutual":
            return mutual_choice(affinity, k * x.shape[0])
        if budgets is None:
            budgets = uniform_budgets(features=self.config.features, k=k, batch=x.shape[0])
        return feature_choice(affinity, budgets)

    def decode(self, code: SparseCode, x: Tensor | None = None) -> Tensor:
        """`x_hat` (tokens, hidden). With an `input_norm`, `x` (tokens, hidden) says what to undo; else it is not looked at."""
        inner = decode(code, self.w_dec.float(), self.b_dec.float())
        if self.config.input_norm == "none":
            return inner
        if x is None:
            raise UserError(f"decoding undoes the {self.config.input_norm} of the input: call decode(code, x)")
        _, shift, scale = self._normalized(self._rows(x).float())
        return inner * scale + shift

    def forward(self, x: Tensor) -> Tensor:
        """`decode(encode(x), x)` for x (tokens, hidden)."""
        return self.decode(self.encode(x), x)

    @torch.no_grad()
    def set_threshold(self, threshold: Tensor | float) -> None:
        """Inference thresholds: a number for all features (mutual choice) or (features,) (feature choice)."""
        value = torch.as_tensor(threshold, dtype=torch.float64, device=self.threshold.device)
        if self.config.choice == "token":
            raise UserError("token choice needs no threshold: it takes the k best features of each token")
        if value.shape not in ((), self.threshold.shape) or bool(value.isnan().any()):
            raise UserError(
                f"thresholds of shape {tuple(value.shape)}: give one number or one for each feature, no NaN"
            )
        self.threshold.copy_(value.expand_as(self.threshold).clamp(min=0))

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Before the optimizer's step: take from the decoder's gradient what runs along its rows."""
        if self.w_dec.grad is not None:
            self.w_dec.grad.copy_(without_parallel(self.w_dec.grad, self.w_dec))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """After the optimizer's step: decoder rows to unit length."""
        self.w_dec.copy_(unit_rows(self.w_dec))

    def weights(self) -> Weights:
        """The numbers as the writers of files take them; not copied. UserError if thresholds are needed and not set."""
        needs = self.config.choice != "token"
        if needs:
            self._needs_threshold("be saved")
        return Weights(
            w_enc=self.w_enc.detach(),
            b_enc=self.b_enc.detach(),
            w_dec=self.w_dec.detach(),
            b_dec=self.b_dec.detach(),
            rule=self.config.choice,
            k=self.config.k,
            threshold=self.threshold.detach() if needs else None,
            input_norm=self.config.input_norm,
            seed=self.config.seed,
            variance=float(self.variance),
            metadata=self.metadata,
        )

    @classmethod
    @torch.no_grad()
    def from_weights(cls, weights: Weights) -> SparseAutoencoder:
        """The module with the numbers that a file held, copied, in evaluation mode."""
        model = cls(weights.config)
        for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
            getattr(model, name).copy_(getattr(weights, name))
        if weights.threshold is not None:
            model.set_threshold(weights.threshold)
        model.variance.fill_(weights.variance)
        model.metadata = dict(weights.metadata)
        return model.eval()

    def save_pretrained(self, folder: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
        """Write `sae_weights.safetensors` and `cfg.json`, each whole or not at all, in the layout SAELens uses.

        TopK is written as `topk`, the others as `jumprelu` with one threshold a feature (they must be set), or as `standard`
        where the rule is thresholds and all are 0. Float32; thresholds are rounded to it. Own facts, `self.metadata` and
        `metadata` (what JSON can hold) stand under `metadata`.
        """
        write_weights(self.weights(), folder, metadata=metadata)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, revision: str | None = None) -> SparseAutoencoder:
        """`sae.load_autoencoder` by the name that users of transformers look for: a folder or a hub id, in any known format."""
        return cls.from_weights(read_weights(path, revision=revision))

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """What the autoencoder sees of x (tokens, hidden), and the shift and scale that take its output back."""
        if self.config.input_norm == "none":
            return x, 0.0, 1.0
        if self.config.input_norm == "token_norm":
            scale = (x.norm(dim=1, keepdim=True) / math.sqrt(x.shape[1])).clamp(min=torch.finfo(x.dtype).tiny)
            return x / scale, 0.0, scale
        shift = x.mean(1, keepdim=True)
        scale = (x - shift).std(1, keepdim=True)
        return (x - shift) / (scale + 1e-5), shift, scale

    def _rows(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.config.hidden:
            raise UserError(
                f"activations of shape {tuple(x.shape)} met an autoencoder of width {self.config.hidden}: give "
                f"(tokens, {self.config.hidden})"
            )
        return x

    def _needs_threshold(self, what: str) -> None:
        if bool(self.threshold.isnan().any()):
            raise UserError(
                f"a {self.config.choice}-choice autoencoder without thresholds cannot {what}: call set_threshold with "
                f"a RunningThreshold's value, or with calibrate_mutual or calibrate_features of a sample"
            )


def load_autoencoder(
    path: str | Path,
    format: Format | Literal["auto"] = "auto",
    *,
    scale: float | None = None,
    revision: str | None = None,
) -> SparseAutoencoder:
    """The autoencoder in a folder or on the hub, in evaluation mode, float32, on the CPU; its provenance is `.metadata`.

    Args:
        path: a folder; or a hub id with the folder inside it, `owner/name/folder` (a revision: `revision`).
        format: whose files they are; `auto` tells by their names.
        scale: the constant by which activations were multiplied in training, for files that leave it to their owner; it
            is folded in, thresholds included.

    Raises:
        UserError: what is missing, damaged, a pickle, or beyond what the module can hold.
    """
    return SparseAutoencoder.from_weights(read_weights(path, format, scale=scale, revision=revision))


def save_autoencoder(
    model: SparseAutoencoder,
    path: str | Path,
    *,
    format: Format = "saelens",
    metadata: dict[str, Any] | None = None,
    densities: Tensor | None = None,
) -> None:
    """Write the files of one autoencoder into a folder, float32, each whole or not at all.

    `metadata` (what JSON can hold; `Provenance` makes it) is added to `model.metadata`. `densities` (features,), shares of
    tokens on which each feature fires, are written as `sparsity.safetensors`, log10, as SAELens does. Refused before a file
    is touched: what the format cannot hold, and thresholds that are not set.
    """
    write_weights(model.weights(), path, format=format, metadata=metadata, densities=densities)


def fold_scale(model: SparseAutoencoder, scale: float) -> SparseAutoencoder:
    """The autoencoder of plain activations x that `model` is of `scale * x`: a new one, in evaluation mode, same decoder.

    `fold_scale(model, s)(x) = model(s x) / s`: biases and thresholds (which must be set) are divided by the scale.
    """
    return SparseAutoencoder.from_weights(model.weights().with_scale(scale))
