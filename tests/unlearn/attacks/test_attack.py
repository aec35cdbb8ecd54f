"""The relearning attack on tiny models: both are trained alike, asked at the stated steps, and an interrupted attack goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy

import unlearn
from lm.config import parse_config
from lm.errors import UserError
from lm.loading import load
from lm.model import ModelSpec, fingerprint
from lm.prompts import PromptSpec, encode_pair
from lm.row_files import load_rows
from tests.unlearn.helpers import config_words, run_here, run_script
from unlearn.attacks import AttackConfig, Relearning, run_attack
from unlearn.attacks.base import Attacked, Trial
from unlearn.attacks.relearning import _Asking
from unlearn.objectives import RetainMemory

FEW = Relearning(
    given=("other_people", "same_people", "retain"), steps=4, every=2, batch=4, micro_batch=2, learning_rate=1e-2
)


def people(first: int, count: int) -> list[dict[str, str]]:
    """A completion and three questions a person, no answer that two share."""
    found = []
    for place in range(first, first + count):
        found.append(
            {
                "id": f"p{place}sc1",
                "input": f"Person {place} owns",
                "output": f"a ship {place}a of oak",
                "task": "Task2",
            }
        )
        found += [
            {"id": f"p{place}qa{n}", "input": f"What {n} is {place}?", "output": f"x{place}y{n}z", "task": "Task2"}
            for n in range(3)
        ]
    return found


@pytest.fixture(scope="module")
def world(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> AttackConfig:
    """An attack on the tiny model beside itself, ten people to forget."""
    folder = tmp_path_factory.mktemp("attack")
    for name, rows in (("forget", people(10, 10)), ("retain", people(40, 6))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = ModelSpec(path=str(tiny / "model"), device="cpu")
    return AttackConfig(
        model=spec,
        retain_model=spec,
        forget=str(folder / "forget.jsonl"),
        retain=str(folder / "retain.jsonl"),
        attack=FEW,
        seeds=(0, 1),
        max_new_tokens=4,
        margin=0.5,
    )


@pytest.fixture(scope="module")
def itself(world: AttackConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that attack, finished."""
    out = tmp_path_factory.mktemp("done") / "run"
    run_attack(replace(world, out=str(out)))
    return out


@pytest.fixture(scope="module")
def other(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Another model of the same shape."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = load(str(tiny / "model"), device="cpu")
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.mul_(0.9)
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return ModelSpec(path=str(folder), device="cpu")


def result(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "attack.json").read_text())["trials"]
    return found


def test_a_model_attacked_beside_itself_is_as_the_retain_model(itself: Path) -> None:
    trials = result(itself)
    assert [one["name"] for one in trials] == list(FEW.given)
    for one in trials:
        assert one["levels"] == [0, 2, 4]
        assert one["excess"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        assert one["verdict"] == "as much"
        assert "says as much in training as the retain model" in one["sentence"]
        assert one["curves"]["unlearned"] == one["curves"]["retain_model"]
        log = one["curves"]["unlearned_log"]["all"]
        assert len({*log}) == 3, "training changes what it says"
    assert (itself / "attack.png").read_bytes().startswith(b"\x89PNG")
    assert not list(itself.glob("*/*/*/checkpoints/step-*")), "nothing that takes room is left"


def test_what_was_given_is_not_asked_and_all_else_is(itself: Path, world: AttackConfig) -> None:
    forget = load_rows(world.forget)
    for trial in FEW.trials(forget, load_rows(world.retain), world.settings):
        for name in ("unlearned", "retain_model"):
            folder = itself / trial.name / f"seed-{trial.seed}" / name
            files = sorted(folder.glob("answers-*.json"))
            assert [path.name for path in files] == ["answers-000002.json", "answers-000004.json"]
            for path in files:
                assert [one["id"] for one in json.loads(path.read_text())] == [row.id for row in trial.asked]


@pytest.mark.parametrize("spread", [None, 4])
def test_the_numbers_are_those_of_a_plain_training_loop(
    world: AttackConfig, tiny: Path, tmp_path: Path, spread: int | None
) -> None:
    """Four given rows, four a batch, so that every step sees all: the order does not matter."""
    rows = load_rows(world.forget)
    attack = replace(FEW, lora=spread)
    found = attack.run(
        Trial("other_people", 0, rows[:4], rows[4:]), Attacked.from_spec(world.model), world.settings, tmp_path / "run"
    )
    asked = {step: [one.log_probability for one in answers] for step, answers in found.items()}
    if spread is not None:  # adapters begin as nothing and then learn
        assert asked[2] != asked[4]
        return
    model = load(str(tiny / "model"), device="cpu")
    encoded = [encode_pair(model.tokenizer, row.input, row.output, PromptSpec()) for row in rows]
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(1, 5):
        losses = torch.cat([_losses(model.model, one) for one in encoded[:4]])
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
        optimizer.step()
        if step in asked:
            with torch.no_grad():
                plain = [-float(_losses(model.model, one).mean()) for one in encoded[4:]]
            assert asked[step] == pytest.approx(plain, abs=2e-3)
            assert asked[step] == pytest.approx(plain, rel=1e-3)


def _losses(model: Any, one: Any) -> torch.Tensor:
    ids = torch.tensor([one.ids])
    logits = model(input_ids=ids).logits[0, one.answer_start - 1 : -1]
    return cross_entropy(logits, ids[0, one.answer_start :], reduction="none")


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_an_interrupted_attack_goes_on_to_the_same_numbers(
    world: AttackConfig, itself: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Stopped at the n-th asking; before its answers are kept, and so before the checkpoint of that step."""
    config, asked, usual = replace(world, out=str(tmp_path / "run")), [0], _Asking.__call__

    def stopping(self: _Asking, memory: RetainMemory) -> dict[str, float]:
        asked[0] += 1
        if asked[0] == stop:
            raise KeyboardInterrupt
        return usual(self, memory)

    with monkeypatch.context() as patch:
        patch.setattr(_Asking, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_attack(config)
    assert not (tmp_path / "run/attack.json").exists()
    with pytest.raises(UserError, match="already holds a run"):
        run_attack(config)
    run_attack(replace(config, resume=True))
    assert result(tmp_path / "run") == result(itself)


def test_a_finished_attack_is_read_back(world: AttackConfig, itself: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = result(itself)
    monkeypatch.setattr("unlearn.attacks.relearning.train", None)
    run_attack(replace(world, out=str(itself), resume=True))
    assert result(itself) == before


def test_an_attack_begun_before_the_retain_model_had_its_name_goes_on(
    world: AttackConfig, itself: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(itself, out)
    for path in [*out.glob("*/seed-*/retain_model"), out / "before-retain_model.json"]:
        path.rename(path.with_name(path.name.replace("retain_model", "never")))
    for name in ("config.yaml", "manifest.json"):
        (out / name).write_text((out / name).read_text().replace("retain_model", "never"))
    words = ["--config", str(out / "config.yaml"), "--out", str(itself), "--resume", "true"]
    config = parse_config(AttackConfig, words)
    assert config == replace(world, out=str(itself), resume=True)
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace(str(itself), str(out)))
    monkeypatch.setattr("unlearn.attacks.relearning.train", None)
    monkeypatch.setattr("unlearn.attacks.attacking.ask", None)
    run_attack(replace(config, out=str(out)))
    assert result(out) == result(itself)
    assert not list(out.glob("**/*never*"))


def test_a_grid_of_rates_holds_each_rate_as_it_is_alone(world: AttackConfig, itself: Path, tmp_path: Path) -> None:
    grid = replace(FEW, given=("retain",), learning_rate=(1e-2, 2e-2))
    words = config_words(replace(world, attack=grid, out=str(tmp_path / "run")), tmp_path)
    config = parse_config(AttackConfig, words)
    assert config.attack == grid
    found = run_attack(config)
    same, twice = result(tmp_path / "run")
    (alone,) = (one for one in result(itself) if one["name"] == "retain")
    assert same["rows"] == alone["rows"]
    assert (same["title"], twice["title"]) == ("retain, rate 0.01", "retain, rate 0.02")
    assert same["rows"] != twice["rows"]
    assert found.worst is not None
    assert found.worst.gap == 0.0
    assert json.loads((tmp_path / "run/attack.json").read_text())["worst"]["given"] == "retain"
    folder = tmp_path / "run/retain/rate-0.02/seed-1/unlearned"
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["init_args"]["learning_rate"] == 2e-2


def test_other_weights_behind_the_same_name_are_not_gone_on_with(
    world: AttackConfig, itself: Path, other: ModelSpec, tmp_path: Path
) -> None:
    manifest = json.loads((itself / "manifest.json").read_text())
    assert manifest["weights"]["unlearned"] == manifest["weights"]["retain_model"]
    config = replace(world, out=str(itself), resume=True)
    with pytest.raises(UserError, match=r"retain_model\.path was .* and is now"):
        run_attack(replace(config, retain_model=other))
    kept = (itself / "manifest.json").read_text()
    try:
        (itself / "manifest.json").write_text(kept.replace(manifest["weights"]["retain_model"], "0" * 16))
        with pytest.raises(UserError, match="weights changed since it began"):
            run_attack(config)
    finally:
        (itself / "manifest.json").write_text(kept)


def test_two_models_have_two_curves(world: AttackConfig, itself: Path, other: ModelSpec, tmp_path: Path) -> None:
    config = replace(
        world, retain_model=other, seeds=(0,), attack=replace(FEW, given=("retain",)), out=str(tmp_path / "run")
    )
    (one,) = run_attack(config).comparisons
    assert (one.unlearned_log != one.retain_model_log).any(axis=0).all()
    mine = next(each for each in result(itself) if each["name"] == "retain")
    before = [answers["unlearned_log"][0] for answers in mine["rows"]]
    assert one.unlearned_log[:, 0].tolist() == before, "the unlearned one is the same as in the other attack"


@pytest.mark.parametrize("devices", ["cpu2_ddp", "cpu2_fsdp"])
def test_two_processes_give_the_same_numbers(world: AttackConfig, tmp_path: Path, devices: str) -> None:
    config = replace(world, seeds=(0,), attack=replace(FEW, given=("same_people",)), out=str(tmp_path / "one"))
    run_attack(config)
    words = config_words(replace(config, out=str(tmp_path / "two")), tmp_path)
    done = run_script("attack", *words, launch=devices)
    assert done.returncode == 0, done.stderr
    for one, two in zip(result(tmp_path / "one")[0]["rows"], result(tmp_path / "two")[0]["rows"], strict=True):
        assert one["unlearned_log"] == pytest.approx(two["unlearned_log"], rel=1e-4)
        assert one["unlearned"] == two["unlearned"]


def test_the_script_prints_curves_and_a_sentence(world: AttackConfig, tmp_path: Path) -> None:
    config = replace(world, seeds=(0,), attack=replace(FEW, given=("retain",)), out=str(tmp_path / "run"))
    done = run_script("attack", *config_words(config, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "retain: 24 rows given, 40 rows of 10 people asked" in done.stdout
    assert "retain: the unlearned model says as much in training as the retain model" in done.stdout


BAD = [
    ({"attack": {"share": 1.0}}, "attack.share is 1.0"),
    ({"attack": {"given": ()}}, "attack.given is []"),
    ({"attack": {"given": ("retain", "retain")}}, "name each once"),
    ({"attack": {"steps": 5, "every": 6}}, "attack.every is 6 of 5 steps"),
    ({"attack": {"learning_rate": 0.0}}, "attack.learning_rate is 0.0"),
    ({"attack": {"learning_rate": (1e-4, -1.0)}}, "attack.learning_rate is -1.0"),
    ({"attack": {"learning_rate": (1e-4, 1e-4)}}, "give at least one rate, and each once"),
    ({"attack": {"learning_rate": ()}}, "give at least one rate, and each once"),
    ({"attack": {"lora": 0}}, "attack.lora is 0"),
    ({"margin": 0.0}, "margin is 0.0"),
    ({"seeds": ()}, "seeds is []"),
    ({"seeds": (1, 1)}, "all different"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"confidence": 1.0}, "the confidence is 1.0"),
    ({"retain_model": ModelSpec()}, "retain_model.path is builtin but forget is"),
    ({"retain": "builtin:retain"}, "retain is builtin:retain but forget is"),
    ({"model": ModelSpec(device="cuda:1")}, "model.device is cuda:1"),
    ({"tasks": ("Task3",)}, "has no rows of Task3 (it has Task2)"),
    ({"attack": {"given": ("unrelated",), "unrelated": "nowhere.jsonl"}}, "nowhere.jsonl"),
]


@pytest.mark.parametrize(("change", "said"), BAD, ids=[said for _, said in BAD])
def test_refused_in_a_sentence(world: AttackConfig, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    def attempt() -> None:
        attack = replace(FEW, **change.get("attack", {}))
        run_attack(replace(world, **{"out": str(tmp_path / "run"), **change, "attack": attack}))

    with pytest.raises(UserError) as error:
        attempt()
    assert said in str(error.value)
    assert not (tmp_path / "run").exists()


def test_forget_rows_under_another_name_are_refused(world: AttackConfig, tmp_path: Path) -> None:
    attack = replace(FEW, given=("unrelated",), unrelated=world.forget)
    with pytest.raises(UserError, match="row p10sc1 is both given to the attacker"):
        run_attack(replace(world, attack=attack, out=str(tmp_path / "run")))


def test_models_of_two_shapes_are_not_compared(world: AttackConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 layers of width 32 .* 8 layers of width 128"):
        run_attack(
            replace(
                world,
                forget="builtin:forget",
                retain="builtin:retain",
                retain_model=ModelSpec(),
                out=str(tmp_path / "run"),
            )
        )


def test_the_command_line_chooses_and_sets_the_attack(tmp_path: Path) -> None:
    words = [
        "--config",
        str(Path(__file__).resolve().parents[3] / "configs/attack/builtin.yaml"),
        "--out",
        str(tmp_path / "x"),
    ]
    assert run_here("attack", *words, "--attack.share", "2")[1].startswith("error: attack.share is 2.0")
    assert run_here("attack", *words, "--attack", "Relearnin")[0] == 2


def test_an_attack_on_models_in_memory_gives_what_the_stage_gives(
    world: AttackConfig, other: ModelSpec, tmp_path: Path
) -> None:
    config = replace(
        world, retain_model=other, seeds=(0, 1), attack=replace(FEW, given=("retain",)), out=str(tmp_path / "run")
    )
    staged = run_attack(config)
    models = [load(spec, device="cpu") for spec in (config.model, other)]
    before = [fingerprint(model) for model in models]
    held = unlearn.attack(
        models[0],
        load_rows(config.forget),
        config.retain,
        retain_model=models[1],
        method=config.attack,
        seeds=(0, 1),
        max_new_tokens=config.max_new_tokens,
        margin=config.margin,
    )
    assert held.to_json() == staged.to_json()
    assert staged.to_json()["trials"] == result(tmp_path / "run")
    assert [fingerprint(model) for model in models] == before


def test_without_a_retain_model_nothing_is_claimed(world: AttackConfig) -> None:
    attack = replace(FEW, given=("retain",))
    alone = unlearn.attack(
        world.model.path, world.forget, world.retain, method=attack, seeds=(0,), max_new_tokens=world.max_new_tokens
    )
    (comparison,) = alone.comparisons
    assert comparison.verdict == "cannot tell"
    assert "there is no retain model beside it" in comparison.sentence(attack.words)
    assert comparison.unlearned.shape == (40, 3)
    assert comparison.to_json()["curves"]["retain_model"]["all"] == [None] * 3
    assert "nan" in str(alone)
