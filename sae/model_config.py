"""What an autoencoder is apart from its numbers: sizes, which features are active, what is done to the input.

The module (`sae.model`) is built from it and the readers of files (`sae.formats`) fill it in; neither needs the other for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lm.errors import UserError

Choice = Literal["token", "feature", "mutual"]
Rule = Choice | Literal["threshold"]
InputNorm = Literal["none", "layer_norm", "token_norm"]


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
