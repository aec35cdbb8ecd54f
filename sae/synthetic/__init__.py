"""Synthetic activations whose features are known: does an autoencoder find what is there?

`Synthetic` is a source of activations like any other (a config names it, the trainer reads it), after SynthSAEBench: many
unit directions in few dimensions, Zipfian firing, correlations, a hierarchy. `truth_of` gives what it is made of,
`match_features` says which of it a decoder found, `Detection` whether features fire where they should.
"""

from sae.synthetic.matching import Detection, DetectionResult, Matching, chance_cosine, match_features
from sae.synthetic.stream import Synthetic, SyntheticActivations
from sae.synthetic.world import Truth, World, firing_law, truth_of

__all__ = [
    "Detection",
    "DetectionResult",
    "Matching",
    "Synthetic",
    "SyntheticActivations",
    "Truth",
    "World",
    "chance_cosine",
    "firing_law",
    "match_features",
    "truth_of",
]
