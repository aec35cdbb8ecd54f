"""`sae.train` on objects in memory: the example of its help, the same numbers as the stage, tensors, and what is refused."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch

import sae
from lm import ModelSpec, Site, UserError, load
from lm.row_files import load_rows
from sae.activations import BufferSpec, ContextSpec, HarvestSpec, NoSource, Rows, Texts
from sae.trainer import AutoencoderSpec, AuxiliarySpec, TrainerConfig, TrainSaeConfig, ZipfSpec, run_train_sae

SITE, OTHER = Site("resid", 0), Site("mlp", 1)
SMALL = {"steps": 6, "batch_tokens": 32, "start_tokens": 64, "calibrate_tokens": 64, "held_out_tokens": 64}
TRAINER = TrainerConfig(**SMALL, warmup=2, log_every=2, backend="cpu")  # type: ignore[arg-type]
SPECS = tuple(AutoencoderSpec(choice=choice, features=24, k=3) for choice in ("token", "mutual", "feature"))  # type: ignore[arg-type]


def activations(tokens: int = 300) -> torch.Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(0))


def test_the_example_of_its_help_runs() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(sae.train, "train")
    assert len(example.examples) > 6
    assert doctest.DocTestRunner().run(example).failed == 0


def test_it_trains_what_the_stage_trains(tiny: Path, tmp_path: Path) -> None:
    """Rows at hand and a loaded model in place of files: the same weights, thresholds and measures, bit for bit."""
    spec, trainer = ModelSpec(path=str(tiny / "model"), device="cpu"), TrainerConfig(**SMALL, recovered_contexts=3)  # type: ignore[arg-type]
    shared = {
        "sites": ("resid.0", "mlp.1"),
        "harvest": HarvestSpec(context=ContextSpec(length=24), forward_contexts=2),
        "buffer": BufferSpec(tokens=256, lanes=4),
        "auxiliary": AuxiliarySpec(k_aux=4, window=40),
        "zipf": ZipfSpec(fit_every=4, least_firings=0),
        "trainer": trainer,
    }
    folders = run_train_sae(
        TrainSaeConfig(
            model=spec,
            source=Rows(path=str(tiny / "forget.jsonl")),
            held_out=Rows(path=str(tiny / "retain.jsonl")),
            autoencoders=SPECS,
            out=str(tmp_path / "run"),
            **shared,  # type: ignore[arg-type]
        )
    )
    done = sae.train(
        load_rows(str(tiny / "forget.jsonl")),
        SPECS,
        model=load(spec),
        held_out=load_rows(str(tiny / "retain.jsonl")),
        show=False,
        **shared,  # type: ignore[arg-type]
    )
    assert done.autoencoders.keys() == folders.keys()
    for result in done.results:
        written = sae.load_autoencoder(folders[result.name])
        for name, value in result.autoencoder.state_dict().items():
            if name not in ("threshold", "variance"):
                assert torch.equal(value, written.state_dict()[name]), (result.name, name)
        for key in ("held_out", "site", "model_name", "hook_name", "l0", "thresholds", "training_tokens"):
            assert result.autoencoder.metadata.get(key) == written.metadata.get(key), (result.name, key)
        assert result.measures["ce_zero"] > 0
    with pytest.raises(UserError, match=r"6 autoencoders were trained: take one of \.autoencoders"):
        _ = done.autoencoder


def test_tensors_need_no_model() -> None:
    lines = []
    done = sae.train(
        {SITE: activations(), OTHER: activations() * 2},
        SPECS[1],
        held_out={SITE: activations(200), OTHER: activations(200) * 2},
        trainer=TRAINER,
        show=False,
        log=lambda step, values: lines.append(step),
    )
    assert [result.site for result in done.results] == [SITE, OTHER]
    assert [entry["step"] for entry in done.log] == lines
    assert lines[:3] == [2, 4, 6]
    assert all(result.thresholds == "held_out" for result in done.results)
    alone = sae.train(activations(), SPECS[1], held_out=activations(200), trainer=TRAINER, show=False)
    assert repr(alone.autoencoder) == "SparseAutoencoder(mutual choice, 24 features, hidden 8, k 3, at resid.0)"
    assert torch.equal(alone.autoencoder.w_enc, done.results[0].autoencoder.w_enc)
    assert sae.train(activations(), SPECS[0], sites=[OTHER], trainer=TRAINER, show=False).results[0].site == OTHER


def test_what_does_not_go_together_is_refused(tiny: Path) -> None:
    for wrong, says in (
        ({"activations": ["a text"]}, "1 documents without a language model"),
        ({"activations": "a text"}, "str is no source of activations"),
        ({"activations": [1.0]}, "list is no source of activations"),
        ({"activations": NoSource()}, "nothing to train on"),
        ({"activations": Texts(texts=("a text",))}, "need the language model"),
        ({"activations": torch.zeros(3)}, r"give \(tokens, hidden\)"),
        ({"sites": [SITE, OTHER]}, "one tensor for 2 sites"),
        ({"autoencoders": []}, "autoencoders is empty"),
        ({"trainer": TrainerConfig(max_seconds=3.0)}, "keeps no checkpoint"),
        ({"trainer": TrainerConfig(evaluate_every=3)}, "nothing is held out"),
        ({"trainer": TrainerConfig(recovered_contexts=3)}, "no text is held out"),
    ):
        asked = {"activations": activations(), "autoencoders": SPECS[0], "trainer": TRAINER} | wrong
        with pytest.raises(UserError, match=says):
            sae.train(**asked, show=False)
