"""Merged checkpoints against plain arithmetic on whole models, TIES against the paper's steps on one long vector; refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny as tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lm.errors import UserError
from lm.loading import load
from lm.model import LanguageModel
from lm.run_folder import RunFolder
from tests.unlearn.helpers import run_here
from unlearn import model_files
from unlearn.merging import weight_files
from unlearn.merging.config import MergeConfig
from unlearn.merging.merge import TaskArithmetic, Ties
from unlearn.merging.stage import run_merge
from unlearn.merging.weight_files import Checkpoint

Weights = dict[str, Tensor]


def saved(family: str, folder: Path, seeds: int, **more: Any) -> tuple[list[str], list[Weights]]:
    """`seeds` models of one family, each a changed copy of the first; their folders and what they store."""
    names, stored = [], []
    base = tiny_model(family, **more)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in base.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                parameter.add_((noise * (seed > 0)).to(parameter.dtype))
        names.append(save(base, folder / f"{family}{seed}"))
        stored.append(load_file(folder / f"{family}{seed}" / "model.safetensors"))
    return names, stored


def save(model: LanguageModel, folder: Path) -> str:
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return str(folder)


def ties(base: Weights, models: list[Weights], density: float, scale: float) -> Weights:
    """The paper's algorithm on flat vectors, element by element."""
    flat = [torch.cat([(one[name] - base[name]).flatten() for name in base]) for one in models]
    trimmed = []
    for vector in flat:
        keep = max(round(density * len(vector)), 1)
        least = vector.abs().sort(descending=True).values[keep - 1]
        trimmed.append(vector.where(vector.abs() >= least, 0.0).tolist())
    result = []
    for values in zip(*trimmed, strict=True):
        mass = sum(values)
        same = [value for value in values if value * mass > 0]
        result.append(scale * sum(same) / len(same) if same else 0.0)
    parts = torch.tensor(result).split([one.numel() for one in base.values()])
    return {name: one + part.reshape(one.shape) for (name, one), part in zip(base.items(), parts, strict=True)}


def test_ties_by_hand() -> None:
    vectors = torch.tensor([[4.0, -3.0, 0.5, 2.0, -1.0], [2.0, 1.0, 0.5, -2.0, 9.0], [0.1, 4.0, 9.0, 0.0, 1.5]])
    change = Ties(density=0.5, scale=2.0).change(vectors, (1.0, 1.0, 1.0))
    # the first: 4 and 2; the second: 1 and 4 against -3; the third: 9; the fourth cancels out; the fifth: 9 and 1.5 against -1
    assert change.tolist() == [6.0, 5.0, 18.0, 0.0, 10.5]


@pytest.mark.parametrize("density", [1.0, 0.3, 1e-9])
@pytest.mark.parametrize("family", ["olmo", "gpt2"])
def test_ties_is_the_papers_over_the_whole_model(family: str, density: float, tmp_path: Path) -> None:
    names, (base, *others) = saved(family, tmp_path, 3)
    method = Ties(density=density, scale=0.7)
    result = load_file(
        run_merge(MergeConfig(base=names[0], models=tuple(names[1:]), method=method, out=str(tmp_path / "run")))
        / "model.safetensors"
    )
    wanted = ties(base, others, density, 0.7)
    assert result.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-6, atol=1e-7)
    changed = sum(int((result[name] != base[name]).sum()) for name in base)
    assert changed == 2 if density < 1e-6 else changed > 1000, "one weight a model is the least"


def test_the_smallest_change_kept_is_exact_with_zeros_ties_and_tiny_numbers(tmp_path: Path) -> None:
    names, (base, *_) = saved("olmo", tmp_path, 2)
    generator = torch.Generator().manual_seed(5)
    values = torch.tensor([0.0, 1e-40, 2.0**-30, -(2.0**-30), 1.0, -1.0, 1.0000001, 1e30])
    made = {name: values[torch.randint(8, one.shape, generator=generator)] for name, one in base.items()}
    save_file({name: torch.zeros_like(one) for name, one in base.items()}, Path(names[0]) / "model.safetensors")
    save_file(made, Path(names[1]) / "model.safetensors")
    sizes = torch.cat([one.abs().flatten() for one in made.values()]).sort(descending=True).values
    for density in (1e-6, 0.1, 0.125, 0.2, 0.4, 0.6, 0.9, 1.0):
        (found,) = Ties(density=density).thresholds(Checkpoint.find(names[0]), [Checkpoint.find(names[1])])
        assert found == float(sizes[max(round(density * len(sizes)), 1) - 1])


@pytest.mark.parametrize("family", ["olmo", "gemma2"])
def test_negation_takes_the_task_vector_away(family: str, tmp_path: Path) -> None:
    names, (base, learned) = saved(family, tmp_path, 2)
    method = TaskArithmetic(weights=(-1.5,))
    path = run_merge(MergeConfig(base=names[0], models=(names[1],), method=method, out=str(tmp_path / "run")))
    result = load_file(path / "model.safetensors")
    for name, tensor in base.items():
        torch.testing.assert_close(result[name], tensor - 1.5 * (learned[name] - tensor), rtol=1e-6, atol=1e-7)
    model = load(str(path), device="cpu")  # tied or not, it loads whole
    ids = torch.arange(3, 12)[None]
    assert bool(model.model(ids).logits.isfinite().all())


def test_weights_that_add_up_to_1_average_whatever_the_base(tmp_path: Path) -> None:
    names, (_, one, two) = saved("llama", tmp_path, 3)
    method = TaskArithmetic(weights=(0.25, 0.75))
    config = MergeConfig(base=names[0], models=(names[1], names[2]), method=method, out=str(tmp_path / "run"))
    result = load_file(run_merge(config) / "model.safetensors")
    for name, tensor in one.items():
        torch.testing.assert_close(result[name], 0.25 * tensor + 0.75 * two[name], rtol=1e-5, atol=1e-6)


def test_weight_0_gives_the_base_bit_for_bit_with_its_types_and_files(tmp_path: Path) -> None:
    names, (base, _) = saved("olmo", tmp_path, 2, dtype=torch.bfloat16)
    config = MergeConfig(
        base=names[0], models=(names[1],), method=TaskArithmetic(weights=(0.0,)), out=str(tmp_path / "run")
    )
    path = run_merge(config)
    result = load_file(path / "model.safetensors")
    assert all(
        torch.equal(result[name], tensor) and result[name].dtype == torch.bfloat16 for name, tensor in base.items()
    )
    assert {file.name for file in path.iterdir()} - {"SHA256SUMS"} == {file.name for file in Path(names[0]).iterdir()}
    manifest = RunFolder(tmp_path / "run").manifest
    assert manifest["weights"] == {
        "base": Checkpoint.find(names[0]).digest(),
        "models": [Checkpoint.find(names[1]).digest()],
    }
    assert "finished" in manifest


def test_a_merge_that_was_interrupted_goes_on_and_a_damaged_one_is_not_called_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, _ = saved("llama", tmp_path, 3)
    config = MergeConfig(base=names[0], models=(names[1], names[2]), method=Ties(), out=str(tmp_path / "run"))
    with monkeypatch.context() as patch:

        def stop(*_: object, **__: object) -> None:
            raise UserError("the disk is full")

        patch.setattr(weight_files, "write", stop)
        with pytest.raises(UserError, match="disk is full"):
            run_merge(config)
    assert not (tmp_path / "run").exists(), "nothing was merged yet"
    whole = load_file(run_merge(config) / "model.safetensors")
    thresholds = RunFolder(tmp_path / "run").manifest["thresholds"]
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(UserError, match="already holds a run"):
        run_merge(config)
    monkeypatch.setattr(Ties, "thresholds", None)  # what was counted is not counted again
    path = run_merge(replace(config, resume=True))
    again = load_file(path / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert RunFolder(tmp_path / "run").manifest["thresholds"] == thresholds
    assert run_merge(replace(config, resume=True)) == path
    (path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is damaged \(config\.json is not as it was written\)"):
        run_merge(replace(config, resume=True))


def test_bf16_models_are_merged_in_float32_and_rounded_once(tmp_path: Path) -> None:
    names, (base, one, two) = saved("olmo", tmp_path, 3, dtype=torch.bfloat16)
    method = TaskArithmetic(weights=(0.3, 0.3))
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        out = tmp_path / str(dtype)
        config = MergeConfig(base=names[0], models=(names[1], names[2]), method=method, save_dtype=dtype, out=str(out))  # type: ignore[arg-type]
        result = load_file(run_merge(config) / "model.safetensors")
        for name, tensor in base.items():
            whole = (
                tensor.float() + 0.3 * (one[name].float() - tensor.float()) + 0.3 * (two[name].float() - tensor.float())
            )
            assert result[name].dtype == expected
            half_a_step = 2**-8 if dtype is None else 1e-6
            torch.testing.assert_close(result[name].float(), whole, rtol=half_a_step, atol=1e-7)
        written = json.loads((out / "model" / "config.json").read_text())
        assert (written.get("dtype") or written.get("torch_dtype")) == str(expected).removeprefix("torch.")


def test_shards_are_read_and_written_as_one_file_is(tmp_path: Path) -> None:
    model = tiny_model("olmo")
    save(model, tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    whole, parts = Checkpoint.find(str(tmp_path / "whole")), Checkpoint.find(str(tmp_path / "parts"))
    weight_files.require_alike(whole, parts)
    (tmp_path / "again").mkdir()
    weight_files.write(tmp_path / "again", whole, parts.read, shard=20_000)
    model_files.copy_config(whole.folder, tmp_path / "again")
    model_files.copy_tokenizer(str(tmp_path / "whole"), tmp_path / "again")
    files = sorted((tmp_path / "again").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 30_000 or file.stat().st_size > 40_000 for file in files), (
        "large tensors stand alone"
    )
    loaded = load(str(tmp_path / "again"), device="cpu").model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.model.state_dict().items())


def drop(weights: Weights) -> None:
    del weights["lm_head.weight"]


def reshape(weights: Weights) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)


def break_one(weights: Weights) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, "stores lm_head.weight and .* tied"),
        (reshape, r"up_proj.weight has shape \(3, 4\)"),
        (break_one, "layers.1.mlp.up_proj.weight of .* is not finite"),
    ],
)
def test_checkpoints_that_do_not_belong_together_are_refused(
    change: Callable[[Weights], None], words: str, tmp_path: Path
) -> None:
    names, (_, weights) = saved("olmo", tmp_path, 2)
    change(weights)
    save_file(weights, Path(names[1]) / "model.safetensors")
    for method in (TaskArithmetic(), Ties()):
        with pytest.raises(UserError, match=words):
            run_merge(MergeConfig(base=names[0], models=(names[1],), method=method, out=str(tmp_path / "run")))
        assert not (tmp_path / "run" / "model").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


def test_another_setting_of_the_model_is_refused_and_another_token_id_is_not(tmp_path: Path) -> None:
    names, _ = saved("olmo", tmp_path, 2)
    path = Path(names[1]) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pad_token_id": 1, "use_cache": False}))
    run_merge(MergeConfig(base=names[0], models=(names[1],), out=str(tmp_path / "run")))
    path.write_text(json.dumps({**config, "tie_word_embeddings": not config.get("tie_word_embeddings", False)}))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        run_merge(MergeConfig(base=names[0], models=(names[1],), out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


def test_a_damaged_file_and_a_missing_tokenizer_are_refused(tmp_path: Path) -> None:
    names, _ = saved("olmo", tmp_path, 2)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (Path(names[0]) / file).unlink()
    with pytest.raises(UserError, match="no tokenizer files"):
        run_merge(MergeConfig(base=names[0], models=(names[1],), out=str(tmp_path / "a")))
    run_merge(MergeConfig(base=names[0], models=(names[1],), tokenizer=names[1], out=str(tmp_path / "b")))
    load(str(tmp_path / "b" / "model"), device="cpu")
    (Path(names[1]) / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        run_merge(MergeConfig(base=names[0], models=(names[1],), out=str(tmp_path / "c")))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MergeConfig(base="a", models=()), "models is empty"),
        (lambda: MergeConfig(base="a", models=("b", "c")), "1 numbers for 2 models"),
        (lambda: MergeConfig(base="a", models=("b",), method=TaskArithmetic(weights=(float("nan"),))), "finite"),
        (lambda: Ties(density=0.0), "density is 0.0"),
        (lambda: Ties(scale=float("inf")), "scale"),
    ],
)
def test_impossible_settings_are_refused(build, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=words):
        build()


def test_the_script_merges(tmp_path: Path) -> None:
    names, (base, one) = saved("olmo", tmp_path, 2)
    (tmp_path / "merge.yaml").write_text(
        json.dumps(
            {
                "base": names[0],
                "models": [names[1]],
                "method": {"class_path": "Ties", "init_args": {"density": 1.0}},
                "out": str(tmp_path / "run"),
            }
        )
    )
    status, _ = run_here("merge", "--config", str(tmp_path / "merge.yaml"))
    assert status == 0
    result = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.allclose(result[name], one[name], atol=1e-6) for name in base)
    status, said = run_here("merge", "--config", str(tmp_path / "merge.yaml"))
    assert status == 2
    assert "already holds a run" in said
