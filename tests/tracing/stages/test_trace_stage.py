"""The stage and its script: from rows on disk to a plan, pictures and records; several processes; mistakes in a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_tracing import PROMPTS, known, say, tiny

from lm.config import dump_yaml, parse_config
from lm.errors import UserError
from lm.model import LanguageModel, ModelSpec
from tests.forked import run_forked
from tracing import Effects, Fact, GaussianNoise, LayerPlan, TokenReplacement, interaction, trace
from tracing.plan import sequential
from tracing.plan.sequential import looks
from tracing.question.fact_source import FactSource
from tracing.settings import Workers
from tracing.stages.trace.config import PlanConfig, TraceConfig
from tracing.stages.trace.stage import run_trace

ROOT = Path(__file__).resolve().parents[3]
SUBJECT = r"\b(ada byron king|ada byron|byron king|king|ada)\b"


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    model = tiny("olmo")
    model.model.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_run_writes_everything_and_goes_on_when_resumed(model_folder: Path, tmp_path: Path) -> None:
    facts = [*known(tiny("olmo"), how_many=6), *known(tiny("olmo", seed=5), answer_tokens=4, how_many=1)]
    config = TraceConfig(model=ModelSpec(path=str(model_folder), device="cpu"), out=str(tmp_path / "run"), seed=3)
    result = run_trace(config, facts)
    folder = tmp_path / "run"
    for name in ("effects.json", "plan.json"):  # which are passed on: ids and reasons, no text that is to be forgotten
        written = json.loads((folder / name).read_text())
        texts = [text for fact in facts for text in (fact.prompt, fact.answer.strip())]
        assert not [text for text in texts if json.dumps(text)[1:-1] in json.dumps(written)]
    assert list(result.plan.provenance["facts_left_out"].values()) == ["the model gives another answer"]
    assert LayerPlan.load(folder / "plan.json") == result.plan
    assert len(result.plan.layers) == 2  # three eighths of four layers, rounded
    assert Effects.load(folder / "effects.npz").facts == tuple(facts[:6])
    about = json.loads((folder / "effects.json").read_text())
    assert about["left_out"] == [{"id": facts[6].id, "reason": "the model gives another answer"}]
    assert len(about["facts"]) == 6
    assert about["tables"]["mlp"]["last_subject"]["facts"] == 6
    table = result.effects.table("mlp", seed=3)
    assert about["tables"]["mlp"]["last_subject"]["mean"] == table.mean[3].tolist()
    assert table.total_effect > 0
    assert about["tables"]["mlp"]["last_subject"]["share"] == pytest.approx(table.mean[3] / table.total_effect)
    assert about["summary"] == result.effects.summary(seed=3).split("\n")
    for name in ("effects", "resid", "mlp", "attn"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["facts"]["count"] == 7
    assert {(folder / name).stat().st_mode & 0o777 for name in ("effects.json", "effects.npz")} == {0o600}
    assert manifest["seconds"] > 0
    with pytest.raises(UserError, match="already holds a run"):
        run_trace(config, facts)
    (folder / "plan.json").unlink()
    again = run_trace(replace(config, resume=True, texts=True), facts)
    assert again.plan == result.plan
    (asked,) = json.loads((folder / "effects.json").read_text())["left_out"]
    assert asked["answer"] == facts[6].answer
    assert "instead of" in asked["reason"]
    assert np.array_equal(again.effects.clean, result.effects.clean)


def test_max_facts_are_drawn_with_the_seed(model_folder: Path, tmp_path: Path) -> None:
    facts = known(tiny("olmo"), how_many=6)

    def chosen(name: str, seed: int) -> list[str]:
        config = TraceConfig(
            model=ModelSpec(path=str(model_folder), device="cpu"),
            kinds=("mlp",),
            facts=FactSource(max_facts=3),
            out=str(tmp_path / name),
            seed=seed,
        )
        return [fact.id for fact in run_trace(config, facts).effects.facts]

    first = chosen("a", 0)
    assert len(first) == 3
    assert chosen("b", 0) == first
    assert any(chosen(f"c{seed}", seed) != first for seed in (1, 2))


def stage(model_folder: Path, out: Path, **settings: Any) -> TraceConfig:
    return TraceConfig(model=ModelSpec(path=str(model_folder), device="cpu"), kinds=("mlp",), out=str(out), **settings)


def test_weak_facts_are_left_out_and_the_rest_may_end_early(model_folder: Path, tmp_path: Path) -> None:
    facts = known(tiny("olmo"), how_many=6)
    everything = run_trace(stage(model_folder, tmp_path / "all"), facts).effects
    bound = float(np.sort(everything.total)[1])
    config = stage(
        model_folder, tmp_path / "some", least_total=bound, stop_when_apart=True, facts=FactSource(max_facts=5), seed=1
    )
    result = run_trace(config, facts)
    drawn = np.random.default_rng(1).permutation(6)
    kept = [facts[place] for place in drawn if everything.total[place] >= bound]
    assert list(result.effects.facts) == kept[:5]
    assert result.effects.provenance["least_total"] == bound
    stopping = LayerPlan.load(tmp_path / "some" / "plan.json").evidence["stopping"]
    assert (stopping["looks"], stopping["looks_planned"], stopping["facts_allowed"]) == (1, 1, 5)
    (tmp_path / "some" / "plan.json").unlink()
    again = run_trace(replace(config, resume=True), facts)
    assert again.plan == result.plan


def test_a_trace_looks_at_growing_numbers_of_facts(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "looks", lambda facts: looks(facts, 2))
    facts = known(tiny("olmo"), how_many=6)
    result = run_trace(stage(model_folder, tmp_path / "run", stop_when_apart=True), facts)
    stopping = result.plan.evidence["stopping"]
    assert (stopping["looks"], stopping["looks_planned"]) == (
        3,
        3,
    )  # two groups of facts are too few, a random model has no places
    assert result.plan.evidence["confidence"] == pytest.approx(1 - 0.05 / 3)
    assert not result.plan.singled_out
    at_once = run_trace(stage(model_folder, tmp_path / "once", facts=FactSource(max_facts=6)), facts)  # the same order
    assert at_once.effects.facts == result.effects.facts
    for one, other in zip(at_once.effects.restored["mlp"], result.effects.restored["mlp"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9)  # other facts share the wave: rounding


def test_other_corruptions_of_the_same_facts_are_traced_beside(model_folder: Path, tmp_path: Path) -> None:
    model = tiny("olmo")
    names = ["ada byron", "byron king", "w3 w9", "king now", "ada"]
    facts = [Fact(f"where is {name} ?", name, say(model, f"where is {name} ?", 2), id=name) for name in names]
    config = stage(
        model_folder, tmp_path / "run", also=(TokenReplacement(samples=2), GaussianNoise(sigmas=1.0)), seed=3
    )
    result = run_trace(config, facts)
    assert list(result.others) == ["TokenReplacement", "GaussianNoise-2"]
    swapped = Effects.load(tmp_path / "run" / "effects-TokenReplacement.npz")
    assert [fact.id for fact in swapped.facts] == names[:4]
    assert "no other subject of 1 token" in swapped.skipped[0].reason
    alone = trace(model, facts, corruption=TokenReplacement(samples=2), kinds=["mlp"], progress=False)
    for one, other in zip(alone.restored["mlp"], swapped.restored["mlp"], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9)
    said = LayerPlan.load(tmp_path / "run" / "plan.json").evidence["also"]
    assert said["TokenReplacement"]["agreement"]["mlp"]["facts"] == 4
    assert said["GaussianNoise-2"]["agreement"]["mlp"]["facts"] == 5
    assert not result.plan.singled_out
    for name in ("effects-TokenReplacement.json", "effects-GaussianNoise-2.png"):
        assert (tmp_path / "run" / name).is_file()


def test_further_metrics_are_written_beside(model_folder: Path, tmp_path: Path) -> None:
    facts = known(tiny("olmo"), how_many=4)
    config = stage(
        model_folder,
        tmp_path / "run",
        metric="log_probability",
        also_metrics=("probability", "negative_kl"),
        also=(GaussianNoise(sigmas=1.0),),
    )
    result = run_trace(config, facts)
    alone = run_trace(stage(model_folder, tmp_path / "alone", metric="log_probability"), facts)
    assert result.plan.layers == alone.plan.layers
    for name in ("probability", "GaussianNoise-2-negative_kl"):
        found = Effects.load(tmp_path / "run" / f"effects-{name}.npz")
        assert found.metric == name.split("-")[-1]
        assert found.facts == result.effects.facts
        assert (tmp_path / "run" / f"effects-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "effects-negative_kl.json").read_text())["clean_mean"] == pytest.approx(0)


def test_a_corruption_that_fits_no_fact_costs_no_finished_work(model_folder: Path, tmp_path: Path) -> None:
    facts = known(tiny("olmo"), how_many=4)  # all ask something else
    result = run_trace(stage(model_folder, tmp_path / "run", also=(TokenReplacement(),)), facts)
    assert len(result.effects.facts) == 4
    assert not result.others
    assert "TokenReplacement could not be compared: none of the facts asked for can be traced" in result.plan.verdict
    assert LayerPlan.load(tmp_path / "run" / "plan.json") == result.plan


def test_several_processes_share_the_facts_and_agree(tmp_path: Path) -> None:
    model = tiny()
    facts = known(model)
    alone = trace(model, facts, kinds=["mlp"], progress=False)
    halves: list[Effects] = []
    stored: list[int] = []

    def other_process() -> None:
        stored.append(len(list(tmp_path.iterdir())))
        halves.append(trace(model, facts, kinds=["mlp"], cache=tmp_path, workers=Workers(0, 2), progress=False))

    halves.append(
        trace(model, facts, kinds=["mlp"], cache=tmp_path, workers=Workers(1, 2, other_process), progress=False)
    )
    assert stored == [1]  # of three facts the second process traces the second
    for half in halves:
        assert np.array_equal(half.clean, alone.clean)
        assert all(np.array_equal(*pair) for pair in zip(half.restored["mlp"], alone.restored["mlp"], strict=True))
    with pytest.raises(UserError, match="give cache"):
        trace(model, facts, workers=Workers(0, 2), progress=False)
    with pytest.raises(UserError, match="another process did not leave fact 'fact1'"):
        trace(model, facts, kinds=["attn"], cache=tmp_path, workers=Workers(0, 2), progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ("resid",)}, "plan.kind is mlp but kinds leaves out mlp"),
        ({"facts": {"sources": ()}}, "facts.sources is empty"),
        ({"facts": {"max_facts": 0}}, "max_facts is 0"),
        ({"window": 0}, "window is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"positions": "subject_and_last", "plan": {"roles": ("further",)}}, "not traced"),
        ({"plan": {"size": 0}}, "plan.size is 0"),
        ({"plan": {"roles": ("lst",)}}, "lst"),
        ({"plan": {"stability": 0}}, "stability is 0"),
        ({"plan": {"rule": "elbow", "size": 3}}, "rule elbow finds how many layers there are"),
        ({"plan": {"rule": "mass", "share": 0}}, "share is 0"),
        ({"least_total": -1}, "least_total is -1"),
    ],
)
def test_impossible_configs_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    plan, facts = settings.pop("plan", {}), settings.pop("facts", {})
    with pytest.raises(UserError, match=message):
        TraceConfig(**settings, facts=FactSource(**facts), plan=PlanConfig(**plan))


def test_the_default_size_is_three_eighths_as_published() -> None:
    assert [PlanConfig().layers(count) for count in (1, 8, 12, 16, 32)] == [1, 3, 4, 6, 12]
    assert PlanConfig(size=5).layers(16) == 5
    assert PlanConfig(rule="mass").layers(16) is None


def test_the_rule_and_several_corruptions_are_read_from_the_command_line(tmp_path: Path) -> None:
    words = ["--plan.rule", "mass", "--plan.share", "0.7", "--also", "[TokenReplacement]", "--least_total", "0.5"]
    config = parse_config(TraceConfig, [*words, "--stop_when_apart", "true"])
    assert (config.plan.rule, config.plan.share, config.also) == ("mass", 0.7, (TokenReplacement(),))
    assert config.stop_when_apart
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert parse_config(TraceConfig, ["--config", str(tmp_path / "config.yaml")]) == config
    with pytest.raises(UserError, match="did you mean 'elbow'"):
        parse_config(TraceConfig, ["--plan.rule", "elbo"])


def test_a_corruption_of_the_command_line_that_is_in_also_is_not_repeated() -> None:
    words = ["--config", str(ROOT / "configs/trace/builtin.yaml")]
    assert list(parse_config(TraceConfig, words).others) == ["TokenReplacement"]
    assert not parse_config(TraceConfig, [*words, "--corruption", "TokenReplacement"]).others
    twice = TraceConfig(also=(TokenReplacement(), GaussianNoise(), TokenReplacement(), TokenReplacement(samples=2)))
    assert twice.others == {"TokenReplacement": TokenReplacement(), "TokenReplacement-2": TokenReplacement(samples=2)}


def test_a_size_beyond_the_model_is_refused_before_tracing(model_folder: Path, tmp_path: Path) -> None:
    config = TraceConfig(model=ModelSpec(path=str(model_folder)), plan=PlanConfig(size=5), out=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"plan\.size is 5 but .* has 4 layers"):
        run_trace(config, known(tiny("olmo")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "trace").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_parse(path: Path) -> None:
    config = parse_config(TraceConfig, ["--config", str(path), "--facts", "other.jsonl"])
    assert config.facts.sources == "other.jsonl"
    shipped = parse_config(TraceConfig, ["--config", str(path)])
    assert shipped.facts.sources != "other.jsonl"
    assert replace(shipped, facts=config.facts) == config
    assert replace(shipped.facts, sources="other.jsonl") == config.facts


def rows_file(model: LanguageModel, path: Path) -> Path:
    rows = [
        {"id": f"p{number}qa0", "input": prompt, "output": say(model, prompt, 2), "task": "Task2"}
        for number, (prompt, _) in enumerate(PROMPTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_script_traces_rows(model_folder: Path, tmp_path: Path) -> None:
    rows = rows_file(tiny("olmo"), tmp_path / "rows.jsonl")
    words = ["--model.path", str(model_folder), "--facts", str(rows), "--out", str(tmp_path / "run"), "--window", "2"]
    words += ["--kinds", "[mlp,attn]", "--facts.subject", SUBJECT]
    done = run_forked(ROOT / "scripts" / "trace.py", *words)
    assert done.returncode == 0, done.stderr
    assert "traced 6 facts, left out 0" in done.stdout
    assert "GaussianNoise: The corruption lowers " in done.stdout
    assert "The evidence " in done.stdout
    assert LayerPlan.load(tmp_path / "run" / "plan.json").provenance["window"] == 2


def test_facts_are_read_from_rows_of_the_asked_tasks_and_known_facts(tmp_path: Path) -> None:
    rows = str(rows_file(tiny("olmo"), tmp_path / "rows.jsonl"))
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps([{"known_id": 7, "prompt": "Ada is a", "subject": "Ada", "attribute": "poet"}]))
    both = FactSource(sources=(str(facts), rows), subject=SUBJECT).read()
    assert [fact.id for fact in both] == ["7", *(f"p{number}qa0" for number in range(6))]
    assert [fact.subject for fact in both[1:]] == [subject for _, subject in PROMPTS]
    with pytest.raises(UserError, match=r"has no rows of Task3 \(it has Task2\)"):
        FactSource(sources=rows, tasks=("Task3",)).read()


def test_questions_and_answers_alone_are_read_and_the_unnamed_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [(f"{word} did Ada Byron do?", "much") for word in ("What", "When", "Where", "Why", "How")]
    pairs += [(f"{word} did Bo Diddley do?", "little") for word in ("What", "When", "Where", "Why", "How")]
    pairs += [("Who was it?", "Ada Byron")]
    path = tmp_path / "questions.json"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    columns = {"input": "question", "output": "answer"}
    source = FactSource(sources=str(path), columns=columns, tasks=(), leave_out_unnamed=True)
    facts = source.read()
    assert [fact.subject for fact in facts] == ["Ada Byron"] * 5 + ["Bo Diddley"] * 5
    assert "left out 1 of 11 questions" in capsys.readouterr().err
    with pytest.raises(UserError, match="1 of 11 rows"):
        replace(source, leave_out_unnamed=False).read()


def test_a_killed_trace_goes_on_to_the_same_file(model_folder: Path, tmp_path: Path) -> None:
    rows = str(rows_file(tiny("olmo"), tmp_path / "rows.jsonl"))
    words = ["--model.path", str(model_folder), "--model.device", "cpu", "--facts", rows, "--facts.subject", SUBJECT]
    words += [
        "--engine",
        "reference",
        "--corruption.samples",
        "40",
        "--also",
        "[{class_path: GaussianNoise, init_args: {seed: 2}}]",
    ]

    def start(name: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(ROOT / "scripts" / "trace.py"), *words, "--out", str(tmp_path / name), *more]
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    whole = start("whole")
    assert whole.wait(timeout=300) == 0
    killed = start("killed")
    finished = tmp_path / "killed" / "facts"
    while killed.poll() is None and len(list(finished.glob("*.npz"))) < 2:
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in finished.glob("*.npz")}
    assert 2 <= len(kept) < 12  # six facts under two corruptions
    assert not (tmp_path / "killed" / "plan.json").exists()
    again = start("killed", "--resume", "true")
    assert again.wait(timeout=300) == 0
    assert len(list(finished.glob("*.npz"))) == 12
    assert all((finished / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    for name in ("effects.npz", "effects-GaussianNoise-2.npz", "plan.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_processes_write_what_one_writes(model_folder: Path, tmp_path: Path) -> None:
    rows = str(rows_file(tiny("olmo"), tmp_path / "rows.jsonl"))
    words = ["--model.path", str(model_folder), "--model.device", "cpu", "--facts", rows, "--facts.subject", SUBJECT]
    script = str(ROOT / "scripts" / "trace.py")
    launch = ["-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "configs" / "accelerate" / "cpu2_ddp.yaml")]
    launch += ["--main_process_port", "0"]
    for name, processes in (("one", None), ("two", "cpu2_ddp")):
        done = run_forked(Path(script), *words, "--out", str(tmp_path / name), launch=processes)
        assert done.returncode == 0, done.stderr[-2000:]
    again = subprocess.run(
        [sys.executable, *launch, script, *words, "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert again.returncode != 0
    assert "already holds a run" in again.stderr
    assert "gloo" not in again.stderr, "the processes fail together"
    one, two = (Effects.load(tmp_path / name / "effects.npz") for name in ("one", "two"))
    assert one.facts == two.facts
    for kind in one.kinds:
        for a, b in zip(one.restored[kind], two.restored[kind], strict=True):
            assert np.array_equal(a, b)
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["devices"]["processes"] == 2
    assert (
        LayerPlan.load(tmp_path / "two" / "plan.json").layers == LayerPlan.load(tmp_path / "one" / "plan.json").layers
    )


def test_windows_come_with_single_layers_and_what_lies_between(model_folder: Path, tmp_path: Path) -> None:
    facts = known(tiny("olmo"), how_many=6)
    config = stage(model_folder, tmp_path / "run", window=2, metric="log_probability")
    result = run_trace(config, facts)
    alone = run_trace(replace(config, window=1, out=str(tmp_path / "alone")), facts).effects
    single = Effects.load(tmp_path / "run" / "effects-single.npz")
    for mine, theirs in zip(single.restored["mlp"], alone.restored["mlp"], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    said = json.loads((tmp_path / "run" / "interaction.json").read_text())
    found = interaction(result.effects, alone)
    ratio = [None if np.isnan(one) else pytest.approx(one, rel=1e-4) for one in found.ratio("mlp")]
    assert said["kinds"]["mlp"]["ratio"] == ratio
    (sentence,) = result.plan.evidence["windows"]
    assert sentence == found.sentence("mlp")
    assert sentence in LayerPlan.load(tmp_path / "run" / "plan.json").evidence["caveats"]
    assert not (tmp_path / "alone" / "interaction.json").exists()
    about = json.loads((tmp_path / "run" / "effects.json").read_text())
    assert about["layers_restored"] == {"mlp": [1, 2, 2, 2]}  # from the layer before to the layer itself
    last = about["tables"]["mlp"]["last_subject"]
    assert last["per_layer"] == pytest.approx([last["mean"][0], *(one / 2 for one in last["mean"][1:])])
    assert (
        "per_layer"
        not in json.loads((tmp_path / "alone" / "effects.json").read_text())["tables"]["mlp"]["last_subject"]
    )
    whole = replace(config, window=9, out=str(tmp_path / "whole"))  # wider than the model
    assert "all cut short" in run_trace(whole, facts).plan.evidence["windows"][0]


def test_a_stopped_trace_goes_on_with_less_memory(model_folder: Path, tmp_path: Path) -> None:
    facts = known(tiny("olmo"), how_many=3)
    first = run_trace(stage(model_folder, tmp_path / "run"), facts)
    again = run_trace(stage(model_folder, tmp_path / "run", memory=0.1, resume=True), facts)
    assert again.plan == first.plan
    with pytest.raises(UserError, match="metric was"):
        run_trace(stage(model_folder, tmp_path / "run", metric="log_probability", resume=True), facts)
