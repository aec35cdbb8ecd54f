"""The localizing stage: every localizer's file, agreement, picture and plan; resuming; several processes; mistakes in a line."""

from __future__ import annotations

import errno
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from tiny_tracing import PROMPTS, known, say, tiny

from lm.anatomy import Kind
from lm.config import parse_config
from lm.errors import UserError
from lm.model import ModelSpec
from tests.forked import run_forked
from tracing import (
    AttributionPatching,
    CausalTracing,
    Fact,
    FactLookup,
    GaussianNoise,
    GradientOverlap,
    LayerPlan,
    LayerScores,
    TokenReplacement,
    WeightAttribution,
    combined_plan,
    compare_all,
    trace,
)
from tracing.localizers.base import Localization, Localizer
from tracing.plan.choose import PlanKind
from tracing.plots.localizers import overview
from tracing.question.fact_source import FactSource
from tracing.stages.localize import stage
from tracing.stages.localize.config import CombinedPlanConfig, LocalizeConfig
from tracing.stages.localize.stage import run_localize

ROOT = Path(__file__).resolve().parents[3]
SUBJECT = r"\b(ada byron king|ada byron|byron king|king|ada)\b"
NOISE = GaussianNoise(samples=2)
THREE: dict[str, Localizer] = {
    "tracing": CausalTracing(corruption=NOISE),
    "overlap": GradientOverlap(),
    "lookup": FactLookup(),
}


@pytest.fixture
def config(tmp_path: Path) -> LocalizeConfig:
    model = tiny("olmo")
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    spec = ModelSpec(path=str(tmp_path / "model"), device="cpu")
    return LocalizeConfig(model=spec, localizers=THREE, out=str(tmp_path / "run"), seed=3)


def test_a_run_writes_everything_and_goes_on_when_resumed(
    config: LocalizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = known(tiny("olmo"), how_many=6)
    wrong = replace(facts[0], answer="w30 w31 w32", id="wrong")
    result = run_localize(config, [*facts[:4], wrong], facts[4:])
    folder = Path(config.out)
    assert LayerPlan.load(folder / "plan.json") == result.plan
    assert len(result.plan.layers) == 2  # three eighths of four layers, rounded
    for name in THREE:
        stored = LayerScores.load(folder / f"{name}.npz")
        assert stored.facts == tuple(facts[:4])
        assert np.array_equal(stored.of("mlp"), result.scores[name].of("mlp"))
    alone = GradientOverlap().localize(tiny("olmo"), facts[:4], retain=facts[4:], progress=False)
    np.testing.assert_allclose(result.scores["overlap"].of("mlp"), alone.of("mlp"), rtol=1e-4)
    told = json.loads((folder / "agreement.json").read_text())
    assert told["localizers"] == list(THREE)
    assert set(told["kinds"]) == {"mlp", "attn"}
    assert told["kinds"]["mlp"][0]["correlation"] == result.agreements.pairs["mlp"]["tracing", "overlap"].correlation
    assert (folder / "agreement.md").read_text() == result.agreements.to_markdown()
    assert (folder / "localizers.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["facts"]["count"], manifest["retain"]["count"]) == (5, 2)
    assert list(manifest["left_out"]["facts"]) == ["wrong"]
    assert manifest["left_out"]["retain"] == {}

    with pytest.raises(UserError, match="already holds a run"):
        run_localize(config, [*facts[:4], wrong], facts[4:])
    again = replace(config, resume=True)
    with pytest.raises(UserError, match="retain changed since it began"):
        run_localize(again, [*facts[:4], wrong], facts[5:])
    (folder / "plan.json").unlink()
    (folder / "lookup.npz").unlink()

    def never(*_: Any, **__: Any) -> LayerScores:
        raise AssertionError("a finished localizer ran again")

    monkeypatch.setattr(CausalTracing, "locate", never)
    monkeypatch.setattr(GradientOverlap, "locate", never)
    resumed = run_localize(again, [*facts[:4], wrong], facts[4:])
    assert resumed.plan == result.plan


def test_max_facts_are_drawn_among_the_known_on_either_side(config: LocalizeConfig) -> None:
    facts = known(tiny("olmo"), how_many=6)
    wrong = [replace(fact, answer="w30 w31 w32", id=f"wrong {fact.id}") for fact in facts]
    few = replace(
        config, facts=FactSource(max_facts=2), localizers={"overlap": GradientOverlap(), "weights": WeightAttribution()}
    )
    result = run_localize(few, [*facts[:4], *wrong], facts[2:])
    assert len(result.scores["weights"].facts) == 2
    assert set(result.scores["weights"].facts) <= set(facts[:4])
    assert len(result.scores["overlap"].details["retain_facts"]) == 2


def test_subjects_are_replaced_by_those_of_all_facts_not_only_of_the_located(config: LocalizeConfig) -> None:
    model, swap = tiny("olmo"), TokenReplacement()
    facts = []
    for subject in ("ada byron", "king now", "w3 w9", "w1 w2"):
        prompt = f"where does {subject} live ?"
        facts.append(Fact(prompt, subject, say(model, prompt, 2), id=subject))
    ways: dict[str, Localizer] = {
        "tracing": CausalTracing(corruption=swap),
        "attribution": AttributionPatching(corruption=swap, verify=10**6),
        "foils": CausalTracing(corruption=swap, metric="logit_difference"),
    }
    found = run_localize(replace(config, facts=FactSource(max_facts=2), localizers=ways), facts).scores
    asked = found["tracing"].facts
    assert len(asked) == 2
    assert [fact.id for fact in found["foils"].facts] == [fact.id for fact in asked]
    expected, alone = (
        trace(
            model, given, corruption=swap, kinds=("mlp",), metric="log_probability", only=asked, progress=False
        ).scores()
        for given in ([*asked, *(fact for fact in facts if fact not in asked)], asked)
    )
    for name in ("tracing", "attribution"):
        assert found[name].facts == asked
        np.testing.assert_allclose(found[name].of("mlp"), expected.of("mlp"), rtol=1e-3, atol=1e-5)
    assert np.abs(alone.of("mlp") - expected.of("mlp")).max() > 1e-2  # one donor each, not three


def test_several_processes_share_the_localizers(config: LocalizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = known(tiny("olmo"), how_many=6)
    alone = run_localize(replace(config, out=config.out + "-alone"), facts[:4], facts[4:])
    found: list[Any] = []
    written: list[list[str]] = []

    def process(index: int, wait: Any) -> SimpleNamespace:
        return SimpleNamespace(
            num_processes=2, process_index=index, is_main_process=index == 0, device="cpu", wait_for_everyone=wait
        )

    def main_process() -> None:
        if not found:
            written.append(sorted(path.stem for path in Path(config.out).glob("*.npz")))
            monkeypatch.setattr(stage, "accelerator", lambda **_: process(0, lambda: None))
            found.append(run_localize(config, facts[:4], facts[4:]))

    monkeypatch.setattr(stage, "launch_facts", lambda _: {})
    monkeypatch.setattr(stage, "accelerator", lambda **_: process(1, main_process))
    found.append(run_localize(config, facts[:4], facts[4:]))
    assert written == [["overlap"]]  # of three localizers the second process runs the second
    for result in found:
        assert result.plan.layers == alone.plan.layers
        for name in THREE:
            np.testing.assert_allclose(result.scores[name].of("mlp"), alone.scores[name].of("mlp"), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"facts": {"sources": ()}}, "facts.sources is empty"),
        ({"retain": ()}, "the localizer overlap compares with facts that must stay"),
        ({"facts": {"max_facts": 1}}, "max_facts is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"localizers": {"one": CausalTracing()}}, "localizers names 1"),
        ({"localizers": {"a/b": CausalTracing(), "c": FactLookup()}}, "'a/b' is no file name"),
        ({"plan": CombinedPlanConfig(kind="resid")}, "the localizer tracing does not score resid"),
        (
            {"localizers": {"a": FactLookup(), "b": WeightAttribution(kinds=("attn",))}},
            "the localizer b does not score mlp",
        ),
        (
            {"localizers": {"a": FactLookup(), "b": WeightAttribution(relative=True)}, "retain": ()},
            "the localizer b compares",
        ),
    ],
)
def test_impossible_configs_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    facts = settings.pop("facts", {})
    with pytest.raises(UserError, match=message):
        LocalizeConfig(**{"localizers": THREE, "facts": FactSource(**facts), **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"size": 0}, "plan.size is 0"), ({"stability": 0.0}, "stability is 0"), ({"confidence": 1.0}, "confidence is 1")],
)
def test_impossible_plans_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CombinedPlanConfig(**settings)


def test_what_cannot_be_traced_is_refused_by_the_localizer() -> None:
    with pytest.raises(UserError, match="window is 0"):
        CausalTracing(window=0)
    with pytest.raises(UserError, match="roles further are not traced with positions subject_and_last"):
        CausalTracing(roles=("further",))


def test_a_size_beyond_the_model_is_refused_before_anything_runs(config: LocalizeConfig) -> None:
    with pytest.raises(UserError, match=r"plan\.size is 5 but .* has 4 layers"):
        run_localize(replace(config, plan=CombinedPlanConfig(size=5)), known(tiny("olmo")))
    assert not Path(config.out).exists()


def test_the_shipped_config_for_lume_has_two_corruptions() -> None:
    config = parse_config(LocalizeConfig, ["--config", str(ROOT / "configs" / "localize" / "lume.yaml")])
    noise, replaced = config.localizers["tracing"], config.localizers["tracing_replaced"]
    assert noise == CausalTracing(corruption=GaussianNoise(samples=3))
    assert replaced == CausalTracing(corruption=TokenReplacement(samples=3))


def test_the_shipped_config_and_overrides_of_one_localizer() -> None:
    path = str(ROOT / "configs" / "localize" / "builtin.yaml")
    config = parse_config(LocalizeConfig, ["--config", path])
    assert set(config.localizers) == {
        "tracing",
        "attribution",
        "gradient_overlap",
        "weights",
        "lookup_subject",
        "lookup_last",
    }
    assert config.localizers["lookup_last"] == FactLookup(position="last")
    words = ["--config", path, "--localizers.tracing.init_args.window", "3", "--retain", "other.jsonl"]
    changed = parse_config(LocalizeConfig, words)
    assert changed.localizers == {**config.localizers, "tracing": CausalTracing(window=3)}
    assert changed.retain == "other.jsonl"
    replaced = {"class_path": "AttributionPatching", "init_args": {"corruption": {"class_path": "TokenReplacement"}}}
    swap = json.dumps({"a": replaced, "b": {"class_path": "FactLookup"}})
    other = parse_config(LocalizeConfig, ["--localizers", swap]).localizers
    assert other == {"a": AttributionPatching(corruption=TokenReplacement()), "b": FactLookup()}
    with pytest.raises(UserError, match="did you mean 'CausalTracing'"):
        parse_config(LocalizeConfig, ["--localizers", '{"a": CausalTracin, "b": FactLookup}'])
    with pytest.raises(UserError, match=r"did you mean 'localizers\.window'"):
        parse_config(
            LocalizeConfig, ["--localizers", '{"a": {"class_path": "CausalTracing", "init_args": {"windo": 3}}}']
        )


def scores_of(profile: np.ndarray, facts: int = 6) -> LayerScores:
    noise = np.random.default_rng(0)
    asked = tuple(Fact(f"is ada {n}", "ada", "w1") for n in range(facts))
    values: dict[Kind, np.ndarray] = {
        kind: profile + noise.normal(0, 0.02, (facts, len(profile))) for kind in ("mlp", "attn")
    }
    return LayerScores(source="made up", unit="points and so on " * 9, facts=asked, values=values)


def test_pictures_of_few_and_many_localizers_and_layers() -> None:
    rising = np.linspace(0, 1, 30)
    drawn = []
    kinds: tuple[tuple[int, PlanKind], ...] = ((2, "mlp"), (7, "mlp"), (7, "both"))
    for count, kind in kinds:
        found = {f"way_{n}": scores_of(rising if n % 2 else -rising) for n in range(count)}
        agreements = compare_all(found, resamples=50)
        plan = combined_plan(found, agreements, size=4, kind=kind, resamples=50)
        drawn.append(overview(found, agreements, plan))
        height, width, _ = np.asarray(imread(io.BytesIO(drawn[-1]))).shape
        assert width > height > 300
    assert overview(found, agreements, plan) == drawn[-1]
    assert len(set(drawn)) == 3
    flat = {"a": scores_of(np.zeros(1)), "b": scores_of(np.zeros(1))}
    agreements = compare_all(flat, resamples=50)
    assert overview(flat, agreements, combined_plan(flat, agreements, size=1, resamples=50)).startswith(b"\x89PNG")


def test_the_script_localizes_rows(config: LocalizeConfig, tmp_path: Path) -> None:
    model = tiny("olmo")
    sides = {"forget": PROMPTS[:4], "retain": PROMPTS[4:]}
    for side, prompts in sides.items():
        rows = [
            {"id": f"{side[0]}{number}qa0", "input": prompt, "output": say(model, prompt, 2), "task": "Task2"}
            for number, (prompt, _) in enumerate(prompts)
        ]
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model.path", config.model.path, "--facts", str(tmp_path / "forget.jsonl"), "--out", config.out]
    words += ["--retain", str(tmp_path / "retain.jsonl"), "--facts.subject", SUBJECT]
    done = run_forked(ROOT / "scripts" / "localize.py", *words)
    assert done.returncode == 0, done.stderr
    assert "gradient_overlap: gradient overlap; share of " in done.stdout
    assert done.stdout.count("; mlp highest at layer ") == 5
    assert "  4 facts; of " in done.stdout
    assert "| mlp | attribution |" in done.stdout
    assert LayerPlan.load(Path(config.out) / "plan.json").verdict in done.stdout


class Refusing(WeightAttribution):
    """A way that cannot work with any facts."""

    def locate(self, asked: Localization) -> LayerScores:
        raise UserError("no class is met twice; give more facts.")


def test_the_others_go_on_when_a_localizer_refuses(config: LocalizeConfig) -> None:
    facts = known(tiny("olmo"), how_many=6)
    refusing = {"tracing": THREE["tracing"], "odd": Refusing(), "weights": WeightAttribution()}
    config = replace(config, localizers=refusing)
    result = run_localize(config, facts)
    alone = run_localize(
        replace(
            config, localizers={name: refusing[name] for name in ("tracing", "weights")}, out=config.out + "-alone"
        ),
        facts,
    )
    reason = {"odd": "no class is met twice; give more facts."}
    assert result.refused == reason
    assert list(result.scores) == list(alone.scores)
    assert result.agreements == alone.agreements
    assert result.plan.layers == alone.plan.layers
    assert "odd" in result.plan.verdict
    folder = Path(config.out)
    assert LayerPlan.load(folder / "plan.json").evidence["refused"] == reason
    assert json.loads((folder / "agreement.json").read_text())["refused"] == reason
    assert json.loads((folder / "manifest.json").read_text())["refused"] == reason
    assert f"odd gave no scores: {reason['odd']}" in (folder / "agreement.md").read_text()
    assert not (folder / "odd.npz").exists()


def test_a_localizer_that_refused_is_asked_again_and_one_alone_is_not_compared(
    config: LocalizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = known(tiny("olmo"), how_many=6)
    config = replace(config, localizers={"odd": Refusing(), "weights": WeightAttribution()})
    with pytest.raises(UserError, match=r"of 2 localizers only weights is left.*odd: no class is met twice"):
        run_localize(config, facts)
    folder = Path(config.out)
    assert (folder / "weights.npz").exists()
    assert not (folder / "plan.json").exists()
    assert not (folder / "agreement.json").exists()
    monkeypatch.setattr(Refusing, "locate", WeightAttribution.locate)
    again = run_localize(replace(config, resume=True), facts)
    assert not again.refused
    assert list(again.scores) == ["odd", "weights"]
    assert "gave no scores" not in again.plan.verdict
    assert not list(folder.glob("*.refused.json"))
    (folder / "odd.refused.json").write_text('{"localizer": "odd", "reason": "of a run killed after its scores"}')
    assert not run_localize(replace(config, resume=True), facts).refused


def test_a_full_disk_is_no_refusal(config: LocalizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        "tracing.engine.fact_cache.pack",
        lambda arrays: monkeypatch.setattr("lm.run_folder.files.os.fsync", full) or b"cells",
    )
    with pytest.raises(UserError, match="the disk is full"):
        run_localize(config, known(tiny("olmo"), how_many=3), known(tiny("olmo"), how_many=3))
    assert not list(Path(config.out).glob("*.refused.json"))
