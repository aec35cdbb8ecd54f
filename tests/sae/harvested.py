"""Texts, sites and a tiny model that activations are harvested from, as both ways of serving them are tested."""

from __future__ import annotations

from families import byte_level, tiny

from lm import LanguageModel, Site
from sae.activations import Texts

SITES = (Site("resid", 1), Site("mlp", 0))
SOURCE = Texts(texts=tuple(f"Document {n}: {'the quick brown fox ' * (n % 5)}naïve {n * n}." for n in range(40)))


def harvested_model() -> LanguageModel:
    made = tiny("llama")
    return LanguageModel(made.model, byte_level(bos=True), made.anatomy, "tiny")
