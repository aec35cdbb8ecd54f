"""From a config to files: the script, `accelerate launch`, resume of live streams and after SIGKILL, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm import ModelSpec, UserError
from lm.config import parse_config
from lm.run_folder import RunFolder
from sae import load_autoencoder
from sae.activations import (
    ActivationFiles,
    BufferSpec,
    Builtin,
    CacheSpec,
    ContextSpec,
    HarvestSpec,
    MaskSpec,
    ReadSpec,
    Rows,
    Source,
    TextFiles,
    Texts,
)
from sae.activations.config import HarvestConfig
from sae.activations.stage import run_harvest
from sae.formats import read_densities
from sae.trainer import AutoencoderSpec, NoSource, TrainerConfig, TrainSaeConfig, ZipfSpec, run_train_sae
from sae.trainer.stage import describe
from tests.forked import run_forked

ROOT = Path(__file__).resolve().parents[3]
SPECS = tuple(
    AutoencoderSpec(choice=choice, features=48, k=4, learning_rate=1e-3)  # type: ignore[arg-type]
    for choice in ("token", "mutual", "feature")
)


def config(tiny: Path, out: Path, **settings: Any) -> TrainSaeConfig:
    trainer = {"steps": 12, "batch_tokens": 32, "start_tokens": 64, "calibrate_tokens": 128, "held_out_tokens": 64}
    trainer |= {"recovered_contexts": 3, "save_every": 4, "log_every": 2, "warmup": 2, "backend": "cpu"} | settings.pop(
        "trainer", {}
    )
    chosen: dict[str, Any] = {
        "model": ModelSpec(path=str(tiny / "model"), device="cpu"),
        "source": Rows(path=str(tiny / "forget.jsonl")),
        "held_out": Rows(path=str(tiny / "retain.jsonl")),
        "sites": ("resid.0", "mlp.1"),
        "harvest": HarvestSpec(context=ContextSpec(length=24), forward_contexts=2),
        "buffer": BufferSpec(tokens=256, lanes=4),
        "autoencoders": SPECS,
        "zipf": ZipfSpec(fit_every=4, least_firings=0),
        "trainer": TrainerConfig(**trainer),
        "out": str(out),
    }
    return TrainSaeConfig(**{**chosen, **settings})


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: load_file(path) for path in sorted(out.glob("*/sae_weights.safetensors"))}


def same(one: Path, other: Path, count: int = 6) -> None:
    mine, theirs = weights(one), weights(other)
    assert len(mine) == count
    assert mine.keys() == theirs.keys()
    for name, tensors in mine.items():
        for key, value in tensors.items():
            assert torch.equal(value, theirs[name][key]), (name, key)


@pytest.fixture(scope="module")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("unbroken")
    run_train_sae(config(tiny, out))
    return out


def test_a_folder_each_in_the_native_format(tiny: Path, unbroken: Path) -> None:
    results = json.loads((unbroken / "results.json").read_text())
    assert len(results) == 6
    for name, measures in results.items():
        model = load_autoencoder(unbroken / name)
        assert model.config.features == 48
        densities = read_densities(unbroken / name)
        assert float(densities.sum()) == pytest.approx(measures["l0_exported"], rel=1e-3)
        facts = model.metadata
        assert facts["site"] in ("resid.0", "mlp.1")
        assert facts["hook_name"] in ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
        assert facts["training_tokens"] == 12 * 32
        assert facts["l0"] == pytest.approx(measures["l0_exported"])
        assert facts["explained_variance"] == pytest.approx(1 - measures["fvu_exported"])
        assert facts["activations"]["masked"]["kept"] > 0
        assert facts["backend"] == "cpu"
        assert facts["thresholds"] == ("none" if "token" in name else "held_out")
        assert facts["num_dead_features"] == round(measures["dead_in_training"] * 48)
        assert measures["ce_zero"] > 0
        assert 0 <= measures["kl"] != measures["kl_zero"]
        assert facts["held_out"]["ce_recovered"] == measures["ce_recovered"]
        assert facts["training"]["autoencoder"]["features"] == 48
    run = RunFolder(unbroken)
    assert run.manifest["finished"]
    assert run.checkpoints() == []
    timed = [entry for entry in run.metrics() if "tokens_per_second" in entry]
    assert [entry["step"] for entry in timed] == [2, 4, 6, 8, 10, 12]
    assert sum(entry.get("ms/forward", 0.0) for entry in timed) > 0  # not every step has to fill the buffer
    assert all(value >= 0 for entry in timed for name, value in entry.items() if name.startswith("ms/"))


def test_rounds_over_the_same_text_are_remarked(tiny: Path, unbroken: Path) -> None:
    settings = config(tiny, unbroken)
    rounds = RunFolder(unbroken).manifest["rounds"]
    assert rounds > 2
    said = describe(settings, {name: unbroken / name for name in json.loads((unbroken / "results.json").read_text())})
    assert f"the activations were read {rounds:.1f} times over" in said
    assert "of its features dead in training" in said


def test_a_finished_run_is_left_alone(tiny: Path, unbroken: Path) -> None:
    before = (unbroken / "results.json").stat().st_mtime_ns
    folders = run_train_sae(config(tiny, unbroken, resume=True))
    assert all(folder.is_dir() for folder in folders.values())
    assert (unbroken / "results.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="already holds a run"):
        run_train_sae(config(tiny, unbroken))


def test_going_on_with_a_live_stream_is_exact(
    tiny: Path, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The buffer, the contexts that wait and the place in the text come back with everything else."""
    import sae.trainer.loop as module

    real, calls = module.train_step, []

    def stops(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 6 * 9 + 2:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(module, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        run_train_sae(config(tiny, tmp_path))
    run = RunFolder(tmp_path)
    assert [step for step, _ in run.checkpoints()] == [4, 8]
    data = run.manifest["data"]
    del data["harvest"]["cut"]  # as if that setting were younger than the run
    run.note(data=data)
    run_train_sae(config(tiny, tmp_path, resume=True))
    same(unbroken, tmp_path)


def test_going_on_after_a_kill_is_exact(tiny: Path, tmp_path: Path) -> None:
    steps = {"trainer": {"steps": 60, "save_every": 10}, "autoencoders": SPECS[1:]}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [sys.executable, str(ROOT / "scripts" / "train_sae.py"), "--config", str(tmp_path / "config.yaml")]
    asked = config(tiny, killed, **steps)
    from lm.config import dump_yaml

    (tmp_path / "config.yaml").write_text(dump_yaml(asked))
    process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not RunFolder(killed).checkpoints() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read() if process.stderr else ""
    assert not (killed / "results.json").exists()
    torch.set_num_threads(1)  # as in the process that was killed: another number may round otherwise
    run_train_sae(dataclasses.replace(asked, resume=True))
    run_train_sae(config(tiny, whole, **steps))
    same(whole, killed, 4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"trainer": {"batch_tokens": 64}}, "trainer.batch_tokens was 32 and is now 64"),
        ({"sweep": {"k": [5]}}, "sweep.k was None and is now"),
        ({"source": Texts(texts=("Ada was born near Varn. " * 9,))}, "source"),
    ],
)
def test_another_config_is_not_resumed(tiny: Path, unbroken: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        run_train_sae(config(tiny, unbroken, resume=True, **changed))


def test_a_run_stopped_by_its_time_goes_on_and_ends(tiny: Path, unbroken: Path, tmp_path: Path) -> None:
    """Each start has the time anew; limits and the rhythm of checkpoints may change on the way."""
    asked = config(tiny, tmp_path, trainer={"max_seconds": 1e-9})
    assert run_train_sae(asked) == {}
    assert run_train_sae(dataclasses.replace(asked, resume=True)) == {}
    assert [step for step, _ in RunFolder(tmp_path).checkpoints()] == [1, 2]
    assert run_train_sae(config(tiny, tmp_path, resume=True, trainer={"max_seconds": 600.0, "save_every": 5}))
    same(unbroken, tmp_path)


def test_a_sharded_run_goes_on_with_another_number_of_shards(tiny: Path, tmp_path: Path) -> None:
    from lm.config import dump_yaml

    asked = config(tiny, tmp_path / "run", trainer={"max_seconds": 1e-9, "feature_shards": 2}, autoencoders=SPECS[:2])
    (tmp_path / "config.yaml").write_text(dump_yaml(asked))
    script = ROOT / "scripts" / "train_sae.py"
    done = run_forked(script, "--config", str(tmp_path / "config.yaml"), launch="cpu2_ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [step for step, _ in RunFolder(tmp_path / "run").checkpoints()] == [1]
    alone = config(tiny, tmp_path / "run", resume=True, trainer={"feature_shards": 1}, autoencoders=SPECS[:2])
    assert len(run_train_sae(alone)) == 4


def test_other_data_behind_the_name_are_not_resumed(tiny: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    text = (tiny / "forget.jsonl").read_text()
    data.write_text(text)
    asked = config(tiny, tmp_path / "run", source=Rows(path=str(data)), trainer={"max_seconds": 1e-9})
    assert run_train_sae(asked) == {}
    data.write_text(text.replace("born", "seen"))
    with pytest.raises(UserError, match="data changed since it began"):
        run_train_sae(dataclasses.replace(asked, resume=True))


def test_activations_in_files_need_no_model(tmp_path: Path) -> None:
    values = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    save_file({"activations": values[:200]}, tmp_path / "train.safetensors")
    save_file({"activations": values[200:]}, tmp_path / "test.safetensors")
    folders = run_train_sae(
        config(
            tmp_path / "no model here",
            tmp_path / "run",
            source=ActivationFiles(path=str(tmp_path / "train.safetensors")),
            held_out=ActivationFiles(path=str(tmp_path / "test.safetensors")),
            sites=("resid.0",),
            sweep={"seed": [0, 1]},
            trainer={"recovered_contexts": 0},
        )
    )
    assert len(folders) == 6
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(measures["tokens"] == 64 for measures in results.values())


def test_what_cannot_be_is_refused_before_training(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to train on"):
        config(tiny, tmp_path, source=NoSource())
    with pytest.raises(UserError, match="held_out is NoSource"):
        config(tiny, tmp_path, held_out=NoSource(), trainer={"evaluate_every": 3, "recovered_contexts": 0})
    with pytest.raises(UserError, match="needs held-out text"):
        config(tiny, tmp_path, held_out=ActivationFiles(path="somewhere"))
    with pytest.raises(UserError, match="feature shards over 1 processes"):
        run_train_sae(config(tiny, tmp_path / "a", trainer={"feature_shards": 2}))
    with pytest.raises(UserError, match="the site 'resid' is not one"):
        config(tiny, tmp_path, sites=("resid",))
    with pytest.raises(UserError, match="holds no text"):
        run_train_sae(config(tiny, tmp_path / "b", source=Texts(texts=("",))))
    one = HarvestSpec(context=ContextSpec(length=24, epochs=1), forward_contexts=2)
    with pytest.raises(UserError, match="the activations ended before training began"):
        run_train_sae(config(tiny, tmp_path / "c", harvest=one, trainer={"start_tokens": 5000}))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs" / "sae").glob("*.yaml")))
def test_every_recipe_is_read(name: str) -> None:
    read = parse_config(TrainSaeConfig, ["--config", str(ROOT / "configs" / "sae" / name), "--trainer.steps", "3"])
    assert read.trainer.steps == 3
    assert read.out.startswith("runs/sae")


def test_the_script_on_the_builtin_model(tmp_path: Path) -> None:
    """Two processes of `accelerate launch`, half of the features each."""
    words = ["--config", str(ROOT / "configs" / "sae" / "builtin.yaml"), "--out", str(tmp_path / "run")]
    words += ["--trainer.steps", "6", "--trainer.feature_shards", "2", "--trainer.batch_tokens", "256"]
    words += ["--trainer.start_tokens", "256", "--trainer.calibrate_tokens", "256", "--trainer.held_out_tokens", "256"]
    words += ["--buffer.tokens", "1024"]
    done = run_forked(ROOT / "scripts" / "train_sae.py", *words, launch="cpu2_ddp")
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if line.startswith("wrote ")]
    assert len(said) == 3
    assert "fvu" in said[0]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["devices"]["processes"] == 2


@pytest.mark.parametrize(
    ("model", "source", "held_out"),
    [
        ("builtin", Builtin(), Builtin(part="unseen")),
        ("builtin:retain_model", Builtin(part="retain"), Builtin(part="unseen")),
        ("builtin", Builtin(part="unseen"), NoSource()),
        ("builtin", Texts(texts=("a",)), NoSource()),
        ("builtin", ActivationFiles(path="somewhere"), NoSource()),
        ("some/model", Builtin(), NoSource()),
    ],
)
def test_what_is_held_out_by_default_suits_model_and_text(model: str, source: Source, held_out: Source) -> None:
    """The built-in world's people are no held-out text of another model: thresholds and measures would be of that text."""
    assert TrainSaeConfig(model=ModelSpec(path=model), source=source).held_out_source == held_out
    given = Texts(texts=("mine",))
    assert TrainSaeConfig(model=ModelSpec(path=model), source=source, held_out=given).held_out_source == given


def test_held_out_is_given_by_words_as_before() -> None:
    words = ["--held_out", "TextFiles", "--held_out.path", "x.txt", "--source", "TextFiles", "--source.path", "y.txt"]
    assert parse_config(TrainSaeConfig, words).held_out == TextFiles(path="x.txt")
    assert parse_config(TrainSaeConfig, words[4:]).held_out_source == NoSource()


def test_a_cache_of_another_model_or_reading_is_refused_and_names_its_model(tiny: Path, tmp_path: Path) -> None:
    settings = config(tiny, tmp_path / "run")
    cached = HarvestConfig(
        model=settings.model,
        source=settings.source,
        sites=settings.sites,
        harvest=settings.harvest,
        cache=CacheSpec(tokens=96, shard_tokens=64),
        out=str(tmp_path / "cache"),
    )
    run_harvest(cached)
    files = ActivationFiles(path=cached.out)
    alike = dataclasses.replace(settings, source=files)
    for name, other, says in (
        ("model", ModelSpec(path="builtin", device="cpu"), "has weights .* give the model that made it"),
        ("model", dataclasses.replace(settings.model, dtype="bfloat16"), "has (weights|dtype) .* in its type"),
        (
            "harvest",
            HarvestSpec(context=ContextSpec(length=16)),
            r"harvest\.context\.length 24 and held_out has 16: set",
        ),
        ("harvest", HarvestSpec(context=ContextSpec(length=24), masks=MaskSpec(first=1)), r"harvest\.masks\.first 0"),
    ):
        with pytest.raises(UserError, match=says):
            run_train_sae(dataclasses.replace(alike, **{name: other}))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
    folders = run_train_sae(
        dataclasses.replace(
            alike,
            model=ModelSpec(),  # not loaded
            held_out=files,
            trainer=dataclasses.replace(settings.trainer, recovered_contexts=0),
        )
    )
    facts = load_autoencoder(next(iter(folders.values()))).metadata
    assert facts["model_name"].endswith("model")
    assert (facts["context_size"], facts["exclude_special_tokens"]) == (24, True)


def test_files_that_end_too_early_are_refused_before_training(tiny: Path, tmp_path: Path) -> None:
    save_file({"activations": torch.randn(640, 32)}, tmp_path / "plain.safetensors")
    settings = config(
        tiny,
        tmp_path / "run",
        source=ActivationFiles(path=str(tmp_path / "plain.safetensors")),
        held_out=NoSource(),
        sites=("resid.0",),
        reading=ReadSpec(epochs=1),
        trainer={"steps": 19, "recovered_contexts": 0},
    )
    with pytest.raises(UserError, match=r"end after 640 tokens, .* need 672: .* or trainer.steps to 18 at most"):
        run_train_sae(settings)
    assert not (tmp_path / "run").exists()
    run_train_sae(dataclasses.replace(settings, trainer=dataclasses.replace(settings.trainer, steps=18)))


def test_text_that_ended_too_early_leaves_what_was_trained(tiny: Path, tmp_path: Path) -> None:
    """The remedy that the message names is one that is taken: fewer steps, from the checkpoint where the text ended."""
    once = HarvestSpec(context=ContextSpec(length=24, epochs=1), forward_contexts=2)
    few = {"steps": 500, "batch_tokens": 16, "start_tokens": 16}
    settings = config(tiny, tmp_path / "run", harvest=once, buffer=BufferSpec(tokens=32, lanes=4), trainer=few)
    with pytest.raises(UserError, match=r"ended after \d+ of 500 steps: the same with trainer.steps") as caught:
        run_train_sae(settings)
    (step,) = re.findall(r"trainer\.steps (\d+) and resume true", str(caught.value))
    fewer = dataclasses.replace(settings.trainer, steps=int(step))
    folders = run_train_sae(dataclasses.replace(settings, trainer=fewer, resume=True))
    assert all((folder / "sae_weights.safetensors").is_file() for folder in folders.values())
