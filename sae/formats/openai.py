"""OpenAI's sparse_autoencoder (Gao et al.): here `autoencoder.safetensors` with the tensors of its `.pt`, and the activation.

Its loader normalizes each token (`layer_norm`) exactly if the activation is `TopK`, so a TopK without that, which training
here makes, cannot be written and is refused. `ReLU` is read too; `Identity`, whose activations may be negative, is not.
The activation stands in the header of the safetensors file: `activation`, and for TopK `k` and `postact_fn`. The state dict
that their `train.py` holds is another one: TopK without any normalization, whose k stands nowhere in it. It is read as
`train.py` with a `k`, and refused without, where their loader takes it for a ReLU.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from lm.errors import UserError
from lm.run_folder import write_atomic
from sae.formats.files import Tensors, write_config
from sae.formats.files import write as write_tensors
from sae.formats.weights import Weights

TRAINED = "train.py"
WEIGHTS, PICKLE, FACTS = "autoencoder.safetensors", "autoencoder.pt", "metadata.json"
CONVERT = (
    "import torch, safetensors.torch as s; d = torch.load('autoencoder.pt', map_location='cpu', weights_only=True); "
    "a = {'activation': d.pop('activation', 'ReLU' if 'latents_mean_square' in d else 'train.py'), "
    "**d.pop('activation_state_dict', {})}; "
    "s.save_file({n: t.contiguous().clone() for n, t in d.items() if torch.is_tensor(t)}, 'autoencoder.safetensors', "
    "{n: str(v) for n, v in a.items()})"
)
"""What the owner of an `autoencoder.pt` runs once, in its folder, with `python -c`."""
WITH_K = (
    "import safetensors.torch as s; f = 'autoencoder.safetensors'; "
    "s.save_file(s.load_file(f), f, {'activation': 'train.py', 'k': 'K'})"
)
"""The same for a state dict of `train.py`, with its k in the place of K."""
_COUNTERS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def read(folder: Path, scale: float | None) -> Weights:
    """See the package."""
    tensors = Tensors(folder / WEIGHTS)
    activation, k, after = (tensors.info.get(name, "") for name in ("activation", "k", "postact_fn"))
    if activation == "ReLU" and "stats_last_nonzero" in tensors.names() and not tensors.names() & set(_COUNTERS[1:]):
        activation = TRAINED  # their Autoencoder has all three counters, their FastAutoencoder the first
    if activation == TRAINED and not k:
        raise UserError(
            f"{tensors.path} is a state dict of OpenAI's train.py, a TopK whose k it does not hold: write the k of its training "
            f'into its header with: python -c "{WITH_K}" (K being that number)'
        )
    if activation not in ("TopK", TRAINED, "ReLU") or after not in ("", "ReLU"):
        unknown = after if activation == "TopK" else activation or "none"
        raise UserError(
            f"{tensors.path} names the activation {unknown!r} in its header, which this project cannot represent: it reads TopK "
            f'and ReLU; if the header is missing, convert the .pt again with: python -c "{CONVERT}"'
        )
    if activation != "ReLU" and not (k.isdecimal() and len(k) < 10):
        raise UserError(
            f"{tensors.path} has k = {k!r:.40} in its header where a whole number belongs: convert the .pt again"
        )
    w_enc = tensors.take("encoder.weight", None, None)
    features, hidden = w_enc.shape
    numbers = Weights(
        w_enc=w_enc,
        b_enc=tensors.take("latent_bias", features),
        w_dec=tensors.take("decoder.weight", hidden, features).T,
        b_dec=tensors.take("pre_bias", hidden),
        rule="threshold" if activation == "ReLU" else "token",
        k=0 if activation == "ReLU" else int(k),
        threshold=torch.zeros(features) if activation == "ReLU" else None,
        input_norm="layer_norm" if activation == "TopK" else "none",
    )
    tensors.drop(_COUNTERS)
    tensors.finish("load and save it with OpenAI's package")
    return numbers if scale is None else numbers.with_scale(scale)


def write(numbers: Weights, folder: Path, metadata: dict[str, Any]) -> None:
    """TopK with `layer_norm`, or ReLU without; the counters as for a new autoencoder. Also `autoencoder.pt`, for its loader."""
    topk = numbers.rule == "token"
    if topk != (numbers.input_norm == "layer_norm") or not (topk or numbers.is_relu):
        raise UserError(
            f"OpenAI's loader knows TopK with layer_norm and ReLU without, and this autoencoder has {numbers.rule} choice with "
            f"input_norm {numbers.input_norm}: write it as saelens"
        )
    features = len(numbers.b_enc)
    tensors = {
        "pre_bias": numbers.b_dec,
        "latent_bias": numbers.b_enc,
        "encoder.weight": numbers.w_enc,
        "decoder.weight": numbers.w_dec.T,
        "stats_last_nonzero": torch.zeros(features, dtype=torch.long),
        "latents_activation_frequency": torch.ones(features),
        "latents_mean_square": torch.zeros(features),
    }
    state: dict[str, Any] = {"k": numbers.k, "postact_fn": "ReLU"} if topk else {}
    header = {"activation": "TopK" if topk else "ReLU", **{name: str(value) for name, value in state.items()}}
    write_config(folder / FACTS, {**numbers.metadata, **metadata})
    write_tensors(folder, WEIGHTS, tensors, info=header)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    pickled = io.BytesIO()
    torch.save({**plain, "activation": header["activation"], "activation_state_dict": state}, pickled)
    write_atomic(folder / PICKLE, pickled.getvalue())
