"""The claims of arXiv 2411.02124, measured: TopK with aux_k beside feature and mutual choice with aux_zipf, over seeds.

    python benchmarks/sae_claims.py --data synthetic --out runs/sae_claims/synthetic
    python benchmarks/sae_claims.py --data real --model FOLDER --text FILE --held_out_text FILE --out runs/sae_claims/real

Same tokens, width, L0, steps and rate for all. `synthetic` has known features (`sae.synthetic`); `real` harvests a model's
middle layer once, into two caches. A seed orders the tokens (or makes the world) and starts the autoencoders. Training is
scripts/train_sae.py's, with the config of the data; `--change '[--trainer.steps, "20"]'` changes it. What is finished is not run
again, and an interrupted run goes on where it was. Prints, and writes as table.md, mean (smallest to largest); curves.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.sae_claims_report import curves, table  # noqa: E402
from lm import LanguageModel, UserError, load  # noqa: E402
from lm.config import parse_config, script  # noqa: E402
from lm.run import progress, write_atomic, write_json  # noqa: E402
from sae import SparseAutoencoder, load_autoencoder  # noqa: E402
from sae.activations import (  # noqa: E402
    ActivationFiles,
    CacheSpec,
    Contexts,
    ReadSpec,
    TextFiles,
    open_activations,
    parse_site,
    write_cache,
)
from sae.metrics import Reconstruction, Recovered, Usage, decoder_cosines, recovered_on  # noqa: E402
from sae.synthetic import Detection, Synthetic, SyntheticActivations, match_features, truth_of  # noqa: E402
from sae.trainer import TrainSaeConfig, run_training  # noqa: E402

WIKITEXT = r" = [^=].* = $"


@dataclass(frozen=True, kw_only=True)
class Claims:
    """What is compared."""

    data: Literal["synthetic", "real"] = "synthetic"
    """Made activations with known features, or a model's."""
    out: str = "runs/sae_claims/synthetic"
    """The folder for everything."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of all autoencoders for each."""
    only: tuple[int, ...] = ()
    """Run only these seeds now; empty: all. The table holds those that are there."""
    recipe: str | None = None
    """The training config; null: configs/sae/claims_<data>.yaml."""
    change: tuple[str, ...] = ()
    """Words that change it."""
    model: str | None = None
    """real: a pretrained model's folder or hub id (docs/sae_claims.md used SmolLM2-135M)."""
    text: str | None = None
    """real: the file of training text, WikiText-2's validation text."""
    held_out_text: str | None = None
    """real: the file of text to score on, WikiText-2's test text."""
    tokens: int = 262_144
    """real: tokens of the training cache, each text token at most once."""
    held_out_tokens: int = 65_536
    """Tokens to score on."""
    contexts: int = 64
    """real: contexts for cross-entropy recovered."""

    def __post_init__(self) -> None:
        if self.data == "real" and not (self.model and self.text and self.held_out_text):
            raise UserError("real data needs a model and two texts: give --model, --text and --held_out_text")


class Made:
    """Synthetic worlds: one for each seed."""

    def __init__(self, asked: Claims, config: TrainSaeConfig) -> None:
        self.asked, self.config = asked, config

    def of_seed(self, seed: int) -> TrainSaeConfig:
        assert isinstance(self.config.source, Synthetic)
        world = replace(self.config.source, seed=seed)
        return replace(self.config, source=world, held_out=replace(world, draw=1))

    def score(self, model: SparseAutoencoder, config: TrainSaeConfig) -> dict[str, float]:
        assert isinstance(config.source, Synthetic)
        world = replace(config.source, draw=2)
        stream = SyntheticActivations(world, batch_tokens=2048)
        matching = match_features(model.w_dec, truth_of(world).directions)
        detection, matches, seen = Detection.start(matching), 0, Seen(model)
        for _ in range(-(-self.asked.held_out_tokens // 2048)):
            batch, truth = stream.with_truth()
            detection = detection.update(seen.code(batch.values), truth)
            matches += truth.matches
        found = detection.result()
        return {
            **seen.result(),
            "mcc": matching.mcc,
            "found": matching.found(0.9),
            "f1": found.f1,
            "precision": found.precision,
            "recall": found.recall,
            "l0_true": matches / seen.usage.tokens,
        }


class Harvested:
    """A model's activations at one site, in two caches."""

    def __init__(self, asked: Claims, config: TrainSaeConfig) -> None:
        self.asked, self.config = asked, config
        self.site = parse_site(config.sites[0])
        folder = Path(asked.out)
        self.texts = [TextFiles(path=str(path), new_document=WIKITEXT) for path in (asked.text, asked.held_out_text)]
        self.folders = [folder / "train", folder / "held_out"]
        for text, where, tokens in zip(self.texts, self.folders, (asked.tokens, asked.held_out_tokens), strict=True):
            if not _finished(where):
                context = replace(config.harvest.context, epochs=1)
                harvest = replace(config.harvest, context=context)
                write_cache(self.model, text, [self.site], where, cache=CacheSpec(tokens=tokens), harvest=harvest)

    @cached_property
    def model(self) -> LanguageModel:
        assert self.asked.model is not None
        return load(self.asked.model, dtype="float32", device="cpu")

    def of_seed(self, seed: int) -> TrainSaeConfig:
        files = [ActivationFiles(path=str(folder)) for folder in self.folders]
        return replace(self.config, source=files[0], held_out=files[1], reading=replace(self.config.reading, seed=seed))

    def score(self, model: SparseAutoencoder, config: TrainSaeConfig) -> dict[str, float]:
        reading = ReadSpec(shuffle=False, epochs=1, keep_last=True)
        files = ActivationFiles(path=str(self.folders[1]))
        seen = Seen(model)
        for batch in open_activations(files, [self.site], batch_tokens=2048, reading=reading):
            seen.code(batch.values)
        behaviour = Recovered()
        rows = list(islice(self.contexts(), self.asked.contexts))
        with progress(len(rows), label="cross-entropy", unit="contexts") as advance:
            for ids, mask in rows:
                behaviour = behaviour.merge(recovered_on(self.model, self.site, model, ids, mask=mask))
                advance(1)
        read = behaviour.result()
        return {**seen.result(), "ce_recovered": read.ce_recovered, "kl": read.kl, "ce_clean": read.ce_clean}

    def contexts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(1, tokens) ids of held-out contexts, and which of them an autoencoder is shown."""
        tokenizer, harvest = self.model.tokenizer, self.config.harvest
        spec = replace(harvest.context, epochs=1, shuffle=False)
        special = torch.tensor(tokenizer.all_special_ids)
        for context in Contexts(self.texts[1].open(tokenizer), tokenizer, spec):
            ids = torch.from_numpy(context.ids)
            mask = ~torch.isin(ids, special)
            mask[: harvest.masks.first] = False
            yield ids.unsqueeze(0), mask.unsqueeze(0)


class Seen:
    """What an exported autoencoder does with some tokens: thresholds, one token at a time."""

    def __init__(self, model: SparseAutoencoder) -> None:
        self.model = model
        self.usage = Usage.start(model.config.features)
        self.reconstruction = Reconstruction.start(model.config.hidden)

    @torch.no_grad()
    def code(self, x: Tensor) -> Any:
        code = self.model.encode(x)
        self.usage = self.usage.update(code)
        self.reconstruction = self.reconstruction.update(x, self.model.decode(code, x))
        return code

    def result(self) -> dict[str, float]:
        fit = self.usage.zipf()
        k = self.model.config.k
        read = self.usage.result(expected=fit.law(k).densities(), tau=0.1)
        assert read.under_used_share is not None
        return {
            "scored_tokens": read.tokens,
            "dead_exported": read.dead_share,
            "under_used": read.under_used_share,
            "rare": float((self.usage.density() < 0.01 * k / self.model.config.features).double().mean()),
            "l0_scored": read.l0,
            "fvu_scored": self.reconstruction.result().fvu,
            "zipf_alpha": fit.alpha,
            "zipf_r_squared": fit.r_squared,
            "c_dec": decoder_cosines(self.model.w_dec).c_dec,
        }


def main(asked: Claims) -> None:
    out = Path(asked.out)
    path = asked.recipe or str(ROOT / "configs" / "sae" / f"claims_{asked.data}.yaml")
    base = parse_config(TrainSaeConfig, ["--config", path, *asked.change])
    data = Made(asked, base) if asked.data == "synthetic" else Harvested(asked, base)
    for seed in asked.only or asked.seeds:
        folder = out / f"seed-{seed}"
        specs = tuple(replace(spec, seed=seed) for spec in base.autoencoders)
        again = (folder / "config.yaml").exists()
        config = replace(data.of_seed(seed), autoencoders=specs, out=str(folder), resume=again)
        for name, where in run_training(config).items():
            scores = out / "scores" / f"seed-{seed}-{name}.json"
            if not scores.exists():
                write_json(scores, data.score(load_autoencoder(where), config))
    found = collected(out, asked)
    text = table(found)
    write_json(out / "results.json", found)
    write_atomic(out / "table.md", text + "\n")
    runs = [out / f"seed-{seed}" for seed in asked.seeds if (out / f"seed-{seed}" / "results.json").exists()]
    write_atomic(out / "curves.png", curves(runs, [spec.name or "" for spec in base.autoencoders], base.trainer))
    print(text)


def collected(out: Path, asked: Claims) -> dict[str, dict[str, dict[str, float]]]:
    """Autoencoder -> seed -> figures, of the runs that are finished."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for seed in asked.seeds:
        folder = out / f"seed-{seed}"
        if (folder / "results.json").exists():
            for name, measures in json.loads((folder / "results.json").read_text()).items():
                scores = json.loads((out / "scores" / f"seed-{seed}-{name}.json").read_text())
                found.setdefault(name, {})[str(seed)] = {**measures, **scores}
    return found


def _finished(folder: Path) -> bool:
    manifest = folder / "manifest.json"
    return manifest.is_file() and bool(json.loads(manifest.read_text()).get("finished"))


if __name__ == "__main__":
    script(main, Claims, description=__doc__)
