"""The autoencoder: its parameters, how it starts, encoding to a `SparseCode`, decoding, and its file.

Untied weights with the encoder started as the decoder's transpose, unit-norm decoder rows and a pre-bias that is
subtracted before encoding and added after decoding (Gao et al. 2024). The allocation is the only thing that differs
between TopK, feature choice and mutual choice. This is the plain form, with dense pre-activations under autograd; it
trains nothing, talks to no hub and imports no language model.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lm.errors import UserError
from lm.run import write_atomic, write_json
from sae.allocate import by_threshold, feature_choice, mutual_choice, token_choice
from sae.budgets import uniform_budgets
from sae.code import SparseCode, decode
from sae.recipe import geometric_median, input_variance, unit_rows, without_parallel

Choice = Literal["token", "feature", "mutual"]
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
_ARCHITECTURES = {"token": "topk", "feature": "jumprelu", "mutual": "jumprelu"}


@dataclass(frozen=True, kw_only=True)
class SparseAutoencoderConfig:
    """What an autoencoder is, apart from its numbers."""

    hidden: int
    """Width of the activations."""
    features: int
    """Width of the dictionary."""
    k: int
    """Mean number of active features a token."""
    choice: Choice = "token"
    """Which allocation: token choice (TopK), feature choice or mutual choice (BatchTopK)."""
    seed: int = 0
    """Of the decoder's random directions."""

    def __post_init__(self) -> None:
        if self.hidden < 1 or not 1 <= self.k <= self.features:
            raise UserError(
                f"an autoencoder of {self.features} features, {self.k} active, on width {self.hidden} cannot be: "
                f"give positive sizes and k no larger than the number of features"
            )
        if self.choice not in get_args(Choice):
            raise UserError(f"the allocation {self.choice!r} is unknown: use one of {', '.join(get_args(Choice))}")


class SparseAutoencoder(nn.Module):
    """`Z = choose((x - b_dec) W_enc^T + b_enc)`, `x_hat = Z W_dec + b_dec`. Badge: **faithful** to Gao et al.'s model.

    Parameters in float32: `w_enc` and `w_dec` (features, hidden), `b_enc` (features,), `b_dec` (hidden,). Buffers:
    `threshold` (features,) float64, NaN until `set_threshold`, and `variance`, NaN until `start_from`.
    """

    threshold: Tensor
    variance: Tensor

    def __init__(self, config: SparseAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
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
        """Set the pre-bias to the geometric median of a (tokens, hidden) sample, and the loss's normaliser, once."""
        self._rows(sample)
        self.variance.fill_(input_variance(sample))
        self.b_dec.copy_(geometric_median(sample))

    def affinity(self, x: Tensor) -> Tensor:
        """(tokens, features) pre-activations in float32, of x (tokens, hidden), whatever the autocast.

        Feature choice computes them as (features, tokens) in memory, the layout its selection is fast in.
        """
        with torch.autocast(x.device.type, enabled=False):
            centred = self._rows(x).float() - self.b_dec
            if self.config.choice == "feature":
                return torch.addmm(self.b_enc.unsqueeze(1), self.w_enc, centred.T).T
            return torch.addmm(self.b_enc, centred, self.w_enc.T)

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
        if not self.training:
            self._needs_threshold("encode outside training")
            return by_threshold(affinity, self.threshold)
        if self.config.choice == "mutual":
            return mutual_choice(affinity, k * x.shape[0])
        if budgets is None:
            budgets = uniform_budgets(features=self.config.features, k=k, batch=x.shape[0])
        return feature_choice(affinity, budgets)

    def decode(self, code: SparseCode) -> Tensor:
        """`x_hat` (tokens, hidden)."""
        return decode(code, self.w_dec, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """`decode(encode(x))` for x (tokens, hidden)."""
        return self.decode(self.encode(x))

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
        """Before the optimiser's step: take from the decoder's gradient what runs along its rows."""
        if self.w_dec.grad is not None:
            self.w_dec.grad.copy_(without_parallel(self.w_dec.grad, self.w_dec))

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """After the optimiser's step: decoder rows to unit length."""
        self.w_dec.copy_(unit_rows(self.w_dec))

    def save_pretrained(self, folder: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
        """Write `sae_weights.safetensors` and `cfg.json`, each whole or not at all, in the layout SAELens uses.

        TopK is written as `topk`, the other two as `jumprelu` with one threshold a feature (they must be set). Float32;
        thresholds are rounded to it. Own facts, and `metadata` (what JSON can hold), stand under `metadata`.
        """
        taken = {"training_architecture", "autoencoder", "input_variance"} & set(metadata or {})
        if taken:
            raise UserError(f"the metadata names {', '.join(sorted(taken))} are the file's own: use other names")
        tensors = {"W_enc": self.w_enc.T, "b_enc": self.b_enc, "W_dec": self.w_dec, "b_dec": self.b_dec}
        if self.config.choice != "token":
            self._needs_threshold("be saved")
            tensors["threshold"] = self.threshold
        variance = float(self.variance)
        config = {
            "architecture": _ARCHITECTURES[self.config.choice],
            "d_in": self.config.hidden,
            "d_sae": self.config.features,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            **({"k": self.config.k, "rescale_acts_by_decoder_norm": False} if self.config.choice == "token" else {}),
            "metadata": {
                **(metadata or {}),
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
    def from_pretrained(cls, folder: str | Path) -> SparseAutoencoder:
        """Read what `save_pretrained` wrote, in evaluation mode. Files of other tools are not read here."""
        folder = Path(folder)
        for name in (WEIGHTS, CONFIG):
            if not (folder / name).is_file():
                raise UserError(f"{folder} has no {name}: give the folder that save_pretrained wrote")
        try:
            facts = json.loads((folder / CONFIG).read_text())["metadata"]
            config = SparseAutoencoderConfig(
                **{field.name: facts["autoencoder"][field.name] for field in fields(SparseAutoencoderConfig)}
            )
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
            raise UserError(
                f"{folder} was not written by this project's save_pretrained ({error!r}): convert it"
            ) from None
        model = cls(config)
        targets: dict[str, Tensor] = {
            "W_enc": model.w_enc.data.T,
            "b_enc": model.b_enc,
            "W_dec": model.w_dec,
            "b_dec": model.b_dec,
        }
        if config.choice != "token":
            targets["threshold"] = model.threshold
        for name, target in targets.items():
            if name not in tensors or tensors[name].shape != target.shape:
                raise UserError(f"{folder / WEIGHTS} lacks {name} of shape {tuple(target.shape)}: the file is damaged")
            target.data.copy_(tensors[name])
        if facts.get("input_variance") is not None:
            model.variance.fill_(facts["input_variance"])
        return model.eval()

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
