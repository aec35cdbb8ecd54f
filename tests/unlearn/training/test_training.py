"""The loop from files to files: what changes, what does not, and what survives an interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.errors import UserError
from lm.loading import load
from lm.model import ModelSpec, fingerprint
from lm.prompts import PromptSpec
from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, reworded, small_config
from tracing.plan.layer_plan import LayerPlan
from unlearn.alternates.base import Refusals
from unlearn.config import UnlearnConfig
from unlearn.objectives import (
    DPO,
    NPO,
    RMU,
    UNDIAL,
    AdaptiveRMU,
    CrossEntropy,
    Fixed,
    GradientAscent,
    GradientDifference,
    HiddenDistance,
    Joint,
    KLMinimization,
    Objective,
)
from unlearn.scope.scope import Lora, Scope
from unlearn.stage import run_unlearn

OBJECTIVES: list[Objective] = [Joint(), GradientAscent(), GradientDifference(), KLMinimization(), NPO()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in RunFolder(run).metrics() if "loss" in line]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_only_the_scope_changes_and_the_rest_is_bit_identical(tiny: Path, tmp_path: Path, objective: Objective) -> None:
    after = weights(run_unlearn(small_config(tiny, tmp_path / "run", objective=objective)))
    before = weights(tiny / "model")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) != name.startswith("model.layers.1.mlp."), name


@pytest.mark.parametrize(
    ("scope", "prefixes"),
    [
        (Scope(layers=(0, 2), modules=("attn",)), ("model.layers.0.self_attn.", "model.layers.2.self_attn.")),
        (Scope(layers=(1,), modules=("all",)), ("model.layers.1.",)),
        (Scope(layers="all", modules=("mlp",)), tuple(f"model.layers.{i}.mlp." for i in range(3))),
        (Scope(layers="model"), ("model.",)),
    ],
)
def test_each_scope_trains_what_it_names(tiny: Path, tmp_path: Path, scope: Scope, prefixes: tuple[str, ...]) -> None:
    after, before = weights(run_unlearn(small_config(tiny, tmp_path / "run", scope=scope))), weights(tiny / "model")
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if name.startswith(prefixes)}


def test_the_checkpoint_is_a_plain_one(tiny: Path, tmp_path: Path) -> None:
    folder = run_unlearn(small_config(tiny, tmp_path / "run"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Ada Brill was born", return_tensors="pt").input_ids
    ours = load(str(folder), device="cpu")
    assert torch.equal(model(ids).logits, ours.model(ids).logits)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr(), "tied weights stay tied"


def test_the_best_checkpoint_by_validation_is_the_one_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = reworded(tiny, tmp_path)
    trainer = replace(SMALL, steps=6, evaluate_every=2, checkpoint="best_task_aggregate", schedule="constant")
    given = iter([0.1, 0.7, 0.3])
    monkeypatch.setattr("unlearn.validation.score", lambda *_, **__: type("S", (), {"task_aggregate": next(given)}))
    best = run_unlearn(small_config(tiny, tmp_path / "best", trainer=trainer, validation=validation))
    assert RunFolder(tmp_path / "best").manifest["best"] == {"value": 0.7, "step": 4.0}
    four = replace(SMALL, steps=4, schedule="constant")
    expected = weights(run_unlearn(small_config(tiny, tmp_path / "four", trainer=four)))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(best).items())


def test_weights_that_are_no_numbers_are_never_saved(tiny: Path, tmp_path: Path) -> None:
    trainer = replace(SMALL, learning_rate=1e36, clip=None, save_every=1, weight_decay=1e4)
    with pytest.raises(UserError, match=r"lower trainer\.learning_rate"):
        run_unlearn(small_config(tiny, tmp_path / "run", trainer=trainer))
    assert not (tmp_path / "run" / "model").exists()
    for _, saved in RunFolder(tmp_path / "run").checkpoints():
        assert all(bool(t.isfinite().all()) for t in load_file(saved / "weights-00000-of-00001.safetensors").values())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: replace(SMALL, learning_rate=float("nan")), "learning_rate is nan"),
        (lambda: replace(SMALL, clip=float("nan")), "clip is nan"),
        (lambda: replace(SMALL, chunk=5), "set trainer.pairing to sequential"),
        (lambda: replace(SMALL, warmup=6), "the peak rate is never reached"),
        (lambda: Fixed(factor=-1.0), "retain_weight.factor is -1"),
        (lambda: Fixed(factor=float("nan")), "retain_weight.factor is nan"),
        (lambda: KLMinimization(forget_cap=float("nan")), "forget_cap is nan"),
        (lambda: Lora(alpha=0), "alpha is 0"),
        (lambda: Scope(layers="model", modules=("mlp",)), "set scope.layers to all"),
        (lambda: UnlearnConfig(objective=UNDIAL(), retain_weight=Fixed(factor=5.0)), "UNDIAL has no retain term here"),
    ],
)
def test_values_that_mean_nothing_are_refused(wrong: Callable[[], object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        wrong()


def test_choosing_by_loss_generates_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearn.validation.generate", lambda *a, **k: pytest.fail("generated answers"))
    trainer = replace(SMALL, steps=2, evaluate_every=1, checkpoint="lowest_joint_loss")
    run_unlearn(small_config(tiny, tmp_path / "run", trainer=trainer, validation=reworded(tiny, tmp_path)))
    lines = [line for line in RunFolder(tmp_path / "run").metrics() if "validation/joint_loss" in line]
    assert len(lines) == 2
    assert all("validation/task_aggregate" not in line for line in lines)


def test_training_on_the_validation_rows_too_is_a_switch(tiny: Path, tmp_path: Path) -> None:
    validation = reworded(tiny, tmp_path)
    trainer = replace(SMALL, steps=None, epochs=1)
    runs = {
        name: small_config(
            tiny, tmp_path / name, trainer=trainer, validation=validation, train_on_validation=name == "with"
        )
        for name in ("with", "without")
    }
    steps = {}
    for name, config in runs.items():
        run_unlearn(config)
        steps[name] = RunFolder(tmp_path / name).manifest["steps"]
    assert steps["with"] == 2 * steps["without"], "the reworded rows are as many as the trained ones"
    with pytest.raises(UserError, match="train_on_validation is true but"):
        small_config(tiny, tmp_path / "x", train_on_validation=True)


def test_a_numbered_gpu_is_refused_where_the_launcher_decides(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        small_config(tiny, tmp_path / "x", model=ModelSpec(path=str(tiny / "model"), device="cuda:1"))


def test_bf16_autocast_keeps_float32_masters_and_pure_bf16_does_not(tiny: Path, tmp_path: Path) -> None:
    auto = run_unlearn(small_config(tiny, tmp_path / "auto", trainer=replace(SMALL, autocast="bf16")))
    assert {t.dtype for t in weights(auto).values()} == {torch.float32}
    pure = small_config(
        tiny, tmp_path / "pure", model=ModelSpec(path=str(tiny / "model"), dtype="bfloat16", device="cpu")
    )
    assert {t.dtype for t in weights(run_unlearn(pure)).values()} == {torch.bfloat16}


def test_saving_in_another_type_says_so_in_the_config(tiny: Path, tmp_path: Path) -> None:
    folder = run_unlearn(small_config(tiny, tmp_path / "run", save_dtype="bfloat16"))
    assert {t.dtype for t in weights(folder).values()} == {torch.bfloat16}
    assert "bfloat16" in (folder / "config.json").read_text()


def test_gradient_checkpointing_changes_memory_not_numbers(tiny: Path, tmp_path: Path) -> None:
    run_unlearn(small_config(tiny, tmp_path / "a"))
    run_unlearn(small_config(tiny, tmp_path / "b", trainer=replace(SMALL, gradient_checkpointing=True)))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-6)


def test_a_time_limit_stops_early_and_keeps_the_result(tiny: Path, tmp_path: Path) -> None:
    folder = run_unlearn(small_config(tiny, tmp_path / "run", trainer=replace(SMALL, steps=500, max_seconds=0.05)))
    assert (folder / "model.safetensors").exists()
    assert 0 < RunFolder(tmp_path / "run").manifest["steps"] < 500


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(tiny: Path, tmp_path: Path) -> None:
    trainer = replace(SMALL, steps=30, learning_rate=1e25, clip=None)
    with pytest.raises(UserError, match=r"loss became .* at step \d+"):
        run_unlearn(small_config(tiny, tmp_path / "run", trainer=trainer))


def test_chat_rows_are_trained_in_the_chat_format(tiny: Path, tmp_path: Path) -> None:
    from lm.prompts import render
    from lm.row_files import load_rows
    from unlearn.training.side import encode_rows

    model = load(str(tiny / "model"), device="cpu")
    model.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    chat = PromptSpec(format="chat", append_eos=False)
    row = load_rows(str(tiny / "forget.jsonl"))[0]
    (encoded,) = encode_rows(model, [row], chat)
    assert model.tokenizer.decode(encoded.ids) == render(model.tokenizer, row.input, chat) + row.output


def test_the_plan_that_tracing_wrote_names_the_layers(tiny: Path, tmp_path: Path) -> None:
    plan = LayerPlan(
        layers=(2,), modules=("mlp",), rule="by hand", singled_out=False, verdict="by hand", evidence={},
        controls={"random": (0,), "inverse": (1,), "all": (0, 1, 2)}, provenance={},
    )  # fmt: skip
    plan.save(tmp_path / "plan.json")
    for use, layers in (("chosen", [2]), ("random", [0]), ("inverse", [1]), ("all", [0, 1, 2])):
        run_unlearn(small_config(tiny, tmp_path / use, scope=Scope(plan=str(tmp_path / "plan.json"), use=use)))
        assert RunFolder(tmp_path / use).manifest["layers"] == layers


def test_a_plan_of_another_model_is_used_with_a_warning(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, mine = tmp_path / "plan.json", fingerprint(load(small_config(tiny, tmp_path).model, device="cpu"))
    for weights, provenance in (
        ("0123456789abcdef", {"weights": "0123456789abcdef"}),
        ("fedcba", {"localizers": {"a": {}, "b": {"weights": "fedcba"}}}),
        (mine, {"weights": mine}),
    ):
        LayerPlan(layers=(2,), provenance=provenance).save(path)
        out = tmp_path / weights
        run_unlearn(small_config(tiny, out, trainer=replace(SMALL, steps=1), scope=Scope(plan=str(path))))
        said = RunFolder(out).manifest.get("plan_warning", "")
        assert (f"drawn from weights {weights}, and these are {mine}" in said) == (weights != mine)
        assert ("warning: the plan" in capsys.readouterr().err) == (weights != mine)


def test_alternates_are_trained_on_and_asked_for_before_anything_loads(tiny: Path, tmp_path: Path) -> None:
    both = {"objective": DPO(), "alternates": Refusals(per_row=2)}
    run_unlearn(small_config(tiny, tmp_path / "cached", trainer=replace(SMALL, steps=5), **both))
    run_unlearn(small_config(tiny, tmp_path / "live", trainer=replace(SMALL, steps=5, reference="live"), **both))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=1e-6)
    assert losses(tmp_path / "cached")[0] != losses(tmp_path / "cached")[3], "the model learns"
    assert "alternates" in RunFolder(tmp_path / "live").manifest["data"]
    with pytest.raises(UserError, match="DPO reads alternate answers and none are given"):
        small_config(tiny, tmp_path / "x", objective=DPO())
    with pytest.raises(UserError, match="NPO reads none"):
        small_config(tiny, tmp_path / "x", objective=NPO(), alternates=Refusals())


@pytest.mark.parametrize("objective", [RMU(layer=1), AdaptiveRMU(layer=1)], ids=lambda o: type(o).__name__)
def test_misdirection_runs_no_deeper_than_its_layer(
    tiny: Path, tmp_path: Path, objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def count(module: torch.nn.Module, _: object) -> None:
        if type(module).__name__ == "OlmoDecoderLayer":
            ran.append(module.self_attn.layer_idx)  # type: ignore[union-attr, arg-type]

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    folder = run_unlearn(small_config(tiny, tmp_path / "run", objective=objective))
    handle.remove()
    assert ran.count(2) == 2, "the checks on loading and on reading back"
    passes = 4 if isinstance(objective, AdaptiveRMU) else 3  # the original too, on the sides that ask for it
    assert ran.count(0) == ran.count(1) == 2 + SMALL.steps * passes
    after, before = weights(folder), weights(tiny / "model")
    assert {n for n in before if not torch.equal(after[n], before[n])} == {
        n for n in before if n.startswith("model.layers.1.mlp.")
    }
    assert all("forget_ce" not in line for line in RunFolder(tmp_path / "run").metrics())
    with pytest.raises(UserError, match="reads the model only up to layer 1: leave later layers out"):
        run_unlearn(small_config(tiny, tmp_path / "deep", objective=objective, scope=Scope(layers=(1, 2))))
    with pytest.raises(UserError, match="layer 7 does not exist"):
        run_unlearn(small_config(tiny, tmp_path / "none", objective=replace(objective, layer=7)))


def test_a_term_that_reads_nothing_that_may_change_is_refused(tiny: Path, tmp_path: Path) -> None:
    """It would have no gradient."""
    above = Scope(layers=(2,))
    shallow = small_config(tiny, tmp_path / "a", objective=RMU(layer=1), retain_loss=CrossEntropy(), scope=above)
    with pytest.raises(UserError, match=r"objective reads the stream after layer 1, .* give it layer 2"):
        run_unlearn(shallow)
    held = small_config(tiny, tmp_path / "b", objective=Joint(), retain_loss=HiddenDistance(layer=0), scope=above)
    with pytest.raises(UserError, match="retain_loss reads the stream after layer 0"):
        run_unlearn(held)


def test_a_warm_up_longer_than_the_epochs_is_refused(tiny: Path, tmp_path: Path) -> None:
    trainer = replace(SMALL, steps=None, epochs=1, warmup=3)  # 12 rows a side, 4 of each a step
    with pytest.raises(UserError, match=r"trainer\.warmup is 3 of 3 steps"):
        run_unlearn(small_config(tiny, tmp_path / "run", trainer=trainer))
    run_unlearn(small_config(tiny, tmp_path / "fewer", trainer=replace(trainer, warmup=2)))
    assert [line["lr"] for line in RunFolder(tmp_path / "fewer").metrics()] == pytest.approx([0.0, 1.5e-3, 3e-3])


def test_the_default_config_is_complete() -> None:
    assert UnlearnConfig().objective == Joint()
