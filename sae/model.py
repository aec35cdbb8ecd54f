"""The autoencoder: its parameters, how it starts, encoding to a `SparseCode`, decoding, and its file.

Untied weights with the encoder started as the decoder's transpose, unit-norm decoder rows and a pre-bias that is
subtracted before encoding and added after decoding (Gao et al. 2024). The allocation is the only thing that differs
between TopK, feature choice and mutual choice. A fourth rule, fixed thresholds, and a normalization of each token hold
what other tools trained (`sae.formats` reads and writes their files). This is the plain form, with dense pre-activations
under autograd; it trains nothing, talks to no hub and imports no language model.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lm.errors import UserError
from lm.run_folder import write_atomic, write_json
from sae.allocate import by_threshold, feature_choice, mutual_choice, token_choice
from sae.budgets import uniform_budgets
from sae.gao_recipe import geometric_median, input_variance, unit_rows, without_parallel
from sae.sparse_code import SparseCode, decode

Choice = Literal["token", "feature", "mutual"]
Rule = Choice | Literal["threshold"]
InputNorm = Literal["none", "layer_norm", "token_norm"]
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
NORMS = {"none": "none", "layer_norm": "layer_norm", "token_norm": "constant_norm_rescale"}
"""How SAELens spells `input_norm`."""
OWN = ("training_architecture", "autoencoder", "input_variance", "sae_lens_version")
"""The metadata that a file of ours states itself. The version is that of SAELens' layout; without it, it reads an older."""
_LAYOUT = "6.0.0"


@dataclass(frozen=True, kw_only=True)
class SparseAutoencoderConfig:
    """What an autoencoder is, apart from its numbers."""

    hidden: int
    """Width of the activations."""
    features: int
    """Width of the dictionary."""
    k: int
    """Mean number of active features a token; 0 where only thresholds say what is active."""
    choice: Rule = "token"
    """Which allocation: token choice (TopK), feature choice or mutual choice (BatchTopK). `threshold` is none of them but
    fixed thresholds in training too: ReLU (thresholds 0) and JumpReLU autoencoders of other tools."""
    seed: int = 0
    """Of the decoder's random directions."""
    input_norm: InputNorm = "none"
    """What is done to each token before the pre-bias and undone after decoding: `layer_norm` takes its mean off and divides
    by its deviation over the width, `token_norm` gives it the length `sqrt(hidden)`."""

    def __post_init__(self) -> None:
        for name in ("hidden", "features", "k", "seed"):
            if type(value := getattr(self, name)) is not int:
                raise UserError(f"{name} = {value!r} of an autoencoder is not a whole number: give one")
        least = 0 if self.choice == "threshold" else 1
        if self.hidden < 1 or self.features < 1 or not least <= self.k <= self.features:
            raise UserError(
                f"an autoencoder of {self.features} features, {self.k} active, on width {self.hidden} cannot be: "
                f"give positive sizes and k no larger than the number of features"
            )
        rules = (*get_args(Choice), "threshold")
        if self.choice not in rules:
            raise UserError(f"the allocation {self.choice!r} is unknown: use one of {', '.join(rules)}")
        if self.input_norm not in get_args(InputNorm):
            raise UserError(
                f"the input_norm {self.input_norm!r} is unknown: use one of {', '.join(get_args(InputNorm))}"
            )


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
            centered = self._normalized(self._rows(x).float())[0] - self.b_dec
            if self.config.choice == "feature":
                return torch.addmm(self.b_enc.unsqueeze(1), self.w_enc, centered.T).T
            return torch.addmm(self.b_enc, centered, self.w_enc.T)

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
        inner = decode(code, self.w_dec, self.b_dec)
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

    def save_pretrained(self, folder: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
        """Write `sae_weights.safetensors` and `cfg.json`, each whole or not at all, in the layout SAELens uses.

        TopK is written as `topk`, the others as `jumprelu` with one threshold a feature (they must be set), or as `standard`
        where the rule is thresholds and all are 0. Float32; thresholds are rounded to it. Own facts, `self.metadata` and
        `metadata` (what JSON can hold) stand under `metadata`.
        """
        taken = set(OWN) & set(metadata or {})
        if taken:
            raise UserError(f"the metadata names {', '.join(sorted(taken))} are the file's own: use other names")
        tensors = {"W_enc": self.w_enc.T, "b_enc": self.b_enc, "W_dec": self.w_dec, "b_dec": self.b_dec}
        architecture = "topk"
        if self.config.choice != "token":
            self._needs_threshold("be saved")
            relu = self.config.choice == "threshold" and not bool(self.threshold.any())
            architecture = "standard" if relu else "jumprelu"
            if not relu:
                tensors["threshold"] = self.threshold
        variance = float(self.variance)
        config = {
            "architecture": architecture,
            "d_in": self.config.hidden,
            "d_sae": self.config.features,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": NORMS[self.config.input_norm],
            "reshape_activations": "none",
            **({"k": self.config.k, "rescale_acts_by_decoder_norm": False} if self.config.choice == "token" else {}),
            "metadata": {
                **self.metadata,
                **(metadata or {}),
                "sae_lens_version": _LAYOUT,
                "training_architecture": f"{self.config.choice}_choice",
                "autoencoder": asdict(self.config),
                "input_variance": None if math.isnan(variance) else variance,
            },
        }
        try:
            json.dumps(config, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"the metadata cannot be written as JSON ({error}): give plain finite values") from None
        plain = {name: tensor.detach().float().contiguous().cpu() for name, tensor in tensors.items()}
        write_atomic(Path(folder) / WEIGHTS, save(plain))
        write_json(Path(folder) / CONFIG, config)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, revision: str | None = None) -> SparseAutoencoder:
        """`sae.load_autoencoder` by the name that users of transformers look for: a folder or a hub id, in any known format."""
        from sae.formats import load_autoencoder  # which builds this class

        return load_autoencoder(path, revision=revision)

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
