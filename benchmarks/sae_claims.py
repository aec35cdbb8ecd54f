"""The claims of arXiv 2411.02124, measured: TopK with aux_k beside feature and mutual choice with aux_zipf, over seeds.

    python -m benchmarks.sae_claims --data synthetic --out runs/sae_claims/synthetic
    python -m benchmarks.sae_claims --data real --model FOLDER --text FILE --held_out_text FILE --out runs/sae_claims/real

Same tokens, width, L0 and steps for all, each at the learning rate that its config gives, which runs with --rate chose.
`synthetic` has known features (`sae.synthetic`); `real` harvests a model's middle layer once, into caches. A seed orders the
tokens (or makes the world) and starts the autoencoders. Training is `palimpsest train-sae`'s, with the config of the data;
`--change '[--trainer.steps, "20"]'` changes it. What is finished is not run again, and an interrupted run goes on where it was.
Prints, and writes as table.md, mean (smallest to largest), and the held-out error at every rate that was run; curves.png.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.claims.report import by_rate, curves, table
from benchmarks.claims.scoring import Seen, in_training, matched
from lm import UserError, load
from lm.config import parse_config, script
from lm.errors import did_you_mean
from lm.model import special_ids
from lm.run_folder import progress, write_atomic, write_json
from sae import SparseAutoencoder, load_autoencoder
from sae.activations import (
    ActivationBatch,
    ActivationFiles,
    CacheSpec,
    Contexts,
    ReadSpec,
    TextFiles,
    Texts,
    open_activations,
    parse_site,
    site_name,
    write_cache,
)
from sae.activations.documents import Documents
from sae.metrics import Recovered, recovered_on
from sae.synthetic import Detection, Synthetic, SyntheticActivations, match_features, truth_of
from sae.trainer import AutoencoderSpec, TrainSaeConfig, run_train_sae

ROOT = Path(__file__).resolve().parents[1]

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
    rate: float | None = None
    """Learning rate of all autoencoders; null: what the config gives each."""
    which: tuple[str, ...] = ()
    """Names of the autoencoders to run; empty: all of the config."""
    model: str | None = None
    """real: a pretrained model's folder or hub id (docs/sae_claims.md used SmolLM2-135M)."""
    text: str | None = None
    """real: the file of training text, WikiText-2's validation text."""
    held_out_text: str | None = None
    """real: the file of text to score on, WikiText-2's test text."""
    tokens: int = 262_144
    """real: tokens of the training cache, each text token at most once."""
    held_out_tokens: int | None = None
    """Tokens to score on, at most; null: 262,144 made ones, or 65,536 harvested ones."""
    calibrate_tokens: int | None = None
    """Tokens on which thresholds are scaled to k active features a token, apart from those scored; null: 32,768 made
    ones, or 16,384 harvested ones."""
    contexts: int = 64
    """real: contexts for cross-entropy recovered."""

    def __post_init__(self) -> None:
        if self.data == "real" and not (self.model and self.text and self.held_out_text):
            raise UserError("real data needs a model and two texts: give --model, --text and --held_out_text")

    @property
    def calibration(self) -> int:
        return self.calibrate_tokens or (1 << 15 if self.data == "synthetic" else 1 << 14)

    @property
    def scored_tokens(self) -> int:
        return self.held_out_tokens or (1 << 18 if self.data == "synthetic" else 1 << 16)


class Made:
    """Synthetic worlds: one for each seed. Draw 0 is trained on, 1 evaluated on meanwhile, 2 calibrates, 3 is scored."""

    def __init__(self, asked: Claims, config: TrainSaeConfig) -> None:
        self.asked, self.config = asked, config

    def of_seed(self, seed: int) -> TrainSaeConfig:
        assert isinstance(self.config.source, Synthetic)
        world = replace(self.config.source, seed=seed)
        return replace(self.config, source=world, held_out=replace(world, draw=1))

    def score(self, model: SparseAutoencoder, config: TrainSaeConfig) -> dict[str, float]:
        assert isinstance(config.source, Synthetic)
        sample = next(SyntheticActivations(replace(config.source, draw=2), batch_tokens=self.asked.calibration))
        model, factor = matched(model, next(iter(sample.by_site.values())))
        world = replace(config.source, draw=3)
        stream = SyntheticActivations(world, batch_tokens=2048)
        matching = match_features(model.w_dec, truth_of(world).directions)
        detection, matches, seen = Detection.start(matching), 0, Seen(model)
        for _ in range(-(-self.asked.scored_tokens // 2048)):
            batch, truth = stream.with_truth()
            detection = detection.update(seen.code(batch.values), truth)
            matches += truth.matches
        found = detection.result()
        return {
            **seen.result(),
            "threshold_factor": factor,
            "mcc": matching.mcc,
            "found": matching.found(0.9),
            "f1": found.f1,
            "precision": found.precision,
            "recall": found.recall,
            "l0_true": matches / seen.usage.tokens,
        }


class Harvested:
    """A model's activations at one site, in three caches: to train on, to calibrate on, to score on.

    The held-out text's articles are dealt out: every fifth one calibrates, the others are scored.
    """

    def __init__(self, asked: Claims, config: TrainSaeConfig) -> None:
        assert asked.model is not None
        assert asked.text is not None
        assert asked.held_out_text is not None
        self.asked, self.config = asked, config
        self.site = parse_site(config.sites[0])
        self.model = load(asked.model, dtype="float32", device="cpu")
        articles = [text for _, text in self._opened(asked.held_out_text).read(epoch=0, start=0, seed=None)]
        self.scored = Texts(texts=tuple(text for place, text in enumerate(articles) if place % 5))
        texts = {
            "train": (TextFiles(path=asked.text, new_document=WIKITEXT), asked.tokens),
            "calibration": (Texts(texts=tuple(articles[::5])), asked.calibration),
            "held_out": (self.scored, asked.scored_tokens),
        }
        harvest = replace(config.harvest, context=replace(config.harvest.context, epochs=1))
        self.caches = {
            name: write_cache(
                self.model, text, [self.site], Path(asked.out) / name, cache=CacheSpec(tokens=tokens), harvest=harvest
            )
            for name, (text, tokens) in texts.items()
        }

    def _opened(self, path: str) -> Documents:
        return TextFiles(path=path, new_document=WIKITEXT).open(self.model.tokenizer)

    def of_seed(self, seed: int) -> TrainSaeConfig:
        source, held_out = (ActivationFiles(path=str(Path(self.asked.out) / name)) for name in ("train", "held_out"))
        return replace(self.config, source=source, held_out=held_out, reading=replace(self.config.reading, seed=seed))

    def score(self, model: SparseAutoencoder, config: TrainSaeConfig) -> dict[str, float]:
        model, factor = matched(model, torch.cat([batch.values for batch in self._read("calibration")]))
        seen = Seen(model)
        for batch in self._read("held_out"):
            seen.code(batch.values)
        behavior = Recovered()
        limit = self.caches["train"].facts["outlier_limits"].get(site_name(self.site))
        rows = list(islice(self.contexts(), self.asked.contexts))
        with progress(len(rows), label="cross-entropy", unit="contexts") as advance:
            for ids, mask in rows:
                found = recovered_on(self.model, self.site, model, ids, mask=mask, largest_norm=limit)
                behavior = behavior.merge(found)
                advance(1)
        read = behavior.result()
        recovered = {"ce_recovered": read.ce_recovered, "kl": read.kl, "ce_clean": read.ce_clean}
        return {**seen.result(), "threshold_factor": factor, **recovered}

    def _read(self, name: str) -> Iterator[ActivationBatch]:
        files = ActivationFiles(path=str(Path(self.asked.out) / name))
        reading = ReadSpec(shuffle=False, epochs=1, keep_last=True)
        yield from open_activations(files, [self.site], batch_tokens=2048, reading=reading)

    def contexts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(1, tokens) ids of scored contexts, and which of them an autoencoder is shown, outliers apart."""
        tokenizer, harvest = self.model.tokenizer, self.config.harvest
        spec = replace(harvest.context, epochs=1, shuffle=False)
        special = torch.tensor(special_ids(tokenizer))
        for context in Contexts(self.scored.open(tokenizer), tokenizer, spec):
            ids = torch.from_numpy(context.ids)
            mask = ~torch.isin(ids, special)
            mask[: harvest.masks.first] = False
            yield ids.unsqueeze(0), mask.unsqueeze(0)


def main(asked: Claims) -> None:
    out = Path(asked.out)
    path = asked.recipe or str(ROOT / "configs" / "sae" / f"claims_{asked.data}.yaml")
    base = parse_config(TrainSaeConfig, ["--config", path, *asked.change])
    data = Made(asked, base) if asked.data == "synthetic" else Harvested(asked, base)
    how = {
        "scored_tokens": asked.scored_tokens,
        "calibrate_tokens": asked.calibration,
        "contexts": asked.contexts,
    }
    wanted = chosen(base.autoencoders, asked)
    for seed in asked.only or asked.seeds:
        for rate in dict.fromkeys(wanted.values()):
            names = [name for name, its in wanted.items() if its == rate]
            specs = [spec for spec in base.autoencoders if spec.name in names]
            folder = run_folder(out, rate, seed)
            config = replace(
                data.of_seed(seed),
                autoencoders=begun(folder, tuple(replace(spec, seed=seed, learning_rate=rate) for spec in specs)),
                out=str(folder),
                resume=(folder / "config.yaml").exists(),
            )
            lacking = [name for name in names if not scored(scores_of(out, rate, seed, name), how)]
            trained = run_train_sae(config) if lacking else {}
            for name in lacking:
                found = data.score(load_autoencoder(trained[name]), config)
                kept = {**found, **in_training(folder, name), "rate": rate, "scored_with": how}
                write_json(scores_of(out, rate, seed, name), kept)
    found = {name: collected(out, name, rate, asked.seeds) for name, rate in wanted.items()}
    tried = {
        name: {rate: runs for rate in rates_in(out) if (runs := collected(out, name, rate, asked.seeds[:1]))}
        for name in wanted
    }
    text = table(found) + "\n\n" + by_rate(tried)
    write_json(out / "results.json", found)
    write_atomic(out / "table.md", text + "\n")
    drawn = {
        name: [run_folder(out, rate, seed) for seed in asked.seeds if str(seed) in found[name]]
        for name, rate in wanted.items()
    }
    write_atomic(out / "curves.png", curves(drawn, base.trainer))
    print(text)


def chosen(specs: Sequence[AutoencoderSpec], asked: Claims) -> dict[str, float]:
    """Name -> learning rate of the autoencoders to run."""
    rates = {}
    for spec in specs:
        rate = asked.rate or spec.learning_rate
        if not spec.name or rate is None:
            raise UserError("the config's autoencoders need a name and a learning_rate each")
        rates[spec.name] = rate
    for name in asked.which:
        if name not in rates:
            raise UserError(f"the config has no autoencoder {name!r}{did_you_mean(name, rates)}")
    return {name: rate for name, rate in rates.items() if not asked.which or name in asked.which}


def begun(folder: Path, specs: tuple[AutoencoderSpec, ...]) -> tuple[AutoencoderSpec, ...]:
    """The autoencoders of the run in `folder` if these are among them, or these."""
    if not (folder / "config.yaml").exists():
        return specs
    there = parse_config(TrainSaeConfig, ["--config", str(folder / "config.yaml")]).autoencoders
    return there if all(spec in there for spec in specs) else specs


def run_folder(out: Path, rate: float, seed: int) -> Path:
    return out / f"rate-{rate:g}" / f"seed-{seed}"


def scores_of(out: Path, rate: float, seed: int, name: str) -> Path:
    return out / f"rate-{rate:g}" / "scores" / f"seed-{seed}-{name}.json"


def scored(path: Path, how: Mapping[str, int]) -> bool:
    """Whether an autoencoder was scored in this way; its weights are not needed any more then."""
    return path.exists() and bool(json.loads(path.read_text())["scored_with"] == how)


def rates_in(out: Path) -> list[float]:
    return sorted(float(folder.name.removeprefix("rate-")) for folder in out.glob("rate-*"))


def collected(out: Path, name: str, rate: float, seeds: Sequence[int]) -> dict[str, dict[str, float]]:
    """Seed -> figures, of the runs that are scored. Scores stand for what training said under the same name."""
    found = {}
    for seed in seeds:
        scores = scores_of(out, rate, seed, name)
        if scores.exists():
            measures = json.loads((run_folder(out, rate, seed) / "results.json").read_text())[name]
            found[str(seed)] = {**measures, **json.loads(scores.read_text())}
    return found


if __name__ == "__main__":
    script(main, Claims, description=__doc__)
