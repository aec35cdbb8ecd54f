"""Single weights: chosen as the scores say, ties by place, and no bit of any other changes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from lm.errors import UserError
from lm.loading import load
from lm.prompts import PromptSpec
from lm.row_files import load_rows
from lm.run_folder import RunFolder
from tests.unlearn.helpers import SMALL, config_words, run_script, small_config
from tests.unlearn.training.test_training import losses, weights
from tests.unlearn.training.test_training_resume import _Stop, _stop_after
from unlearn.forward.passes import Passes, collate
from unlearn.objectives import NPO
from unlearn.scope.scope import Lora, Scope, WeightMask
from unlearn.stage import run_unlearn
from unlearn.training.masks import FILE, make_masks, relative, top_share
from unlearn.training.side import Side, encode_rows

MASKED = Scope(layers=(1,), mask=WeightMask(share=0.05))
DECAYING = replace(SMALL, weight_decay=0.1)


def test_the_highest_scores_are_chosen_and_ties_go_to_the_first() -> None:
    scores = {"a": torch.tensor([[1.0, 5.0], [3.0, 3.0]]), "b": torch.tensor([3.0, 9.0])}
    assert {name: mask.tolist() for name, mask in top_share(scores, 0.5).items()} == {
        "a": [[False, True], [True, False]],
        "b": [False, True],
    }
    assert sum(int(mask.sum()) for mask in top_share(scores, 1.0).values()) == 6
    assert top_share(scores, 1e-9)["b"].tolist() == [False, True], "one at least"


def test_a_score_is_relative_to_the_retain_rows() -> None:
    forget = {"a": torch.tensor([2.0, 2.0]), "b": torch.tensor([6.0])}
    retain = {"a": torch.tensor([0.0, 3.0]), "b": torch.tensor([0.0])}
    found = relative(forget, retain)
    assert found["a"].tolist() == pytest.approx([2.0, 0.5])
    assert found["b"].tolist() == pytest.approx([6.0])
    assert relative(forget, {}) is forget


def test_the_choice_is_gradient_times_weight_of_whole_sides(tiny: Path, tmp_path: Path) -> None:
    model = load(str(tiny / "model"), device="cpu")
    Scope(layers=(1,)).resolve(model.anatomy).apply(model.model, model.anatomy)
    sides = [encode_rows(model, load_rows(str(tiny / f"{side}.jsonl")), PromptSpec()) for side in ("forget", "retain")]
    passes = Passes(Accelerator(cpu=True), model.model, model)
    run = RunFolder.create(tmp_path, SMALL)
    make_masks(passes, Side(sides[0]), Side(sides[1]), WeightMask(share=0.1, rows=6), run, micro_batch=4)
    assert all(p.grad is None for p in model.model.parameters())
    named = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    scores = []
    for rows in sides:
        inputs = collate(rows[::2], 0, torch.device("cpu"))
        logits = model.model(input_ids=inputs.ids, attention_mask=inputs.attention).logits[:, :-1][inputs.mask]
        loss = torch.nn.functional.cross_entropy(logits, inputs.targets[inputs.mask])
        gradients = torch.autograd.grad(loss, list(named.values()))
        scores.append(torch.cat([(g * p).abs().flatten() for g, p in zip(gradients, named.values(), strict=True)]))
    ratio = (scores[0] / (scores[1] + scores[1].mean())).detach()
    found = load_file(tmp_path / FILE)
    mask = torch.cat([found[name].flatten().bool() for name in named])
    assert int(mask.sum()) == round(0.1 * len(mask))
    assert float(ratio[mask].min()) >= float(ratio[~mask].max()) * (1 - 1e-4)


def test_a_mask_in_which_a_bit_flipped_is_not_taken(tiny: Path, tmp_path: Path) -> None:
    config = small_config(tiny, tmp_path / "run", scope=MASKED, trainer=DECAYING)
    result = run_unlearn(config)
    shutil.rmtree(result)  # as if it had been killed before the export
    mask = tmp_path / "run" / FILE
    mask.write_bytes(mask.read_bytes()[:-1] + b"\x07")
    with pytest.raises(UserError, match=r"mask\.safetensors is not as it was written"):
        run_unlearn(replace(config, resume=True))


@pytest.mark.parametrize("autocast", ["no", "bf16"])
def test_no_bit_of_another_weight_changes_under_weight_decay(tiny: Path, tmp_path: Path, autocast: str) -> None:
    trainer = replace(DECAYING, autocast=autocast)
    after = weights(run_unlearn(small_config(tiny, tmp_path / "run", scope=MASKED, trainer=trainer)))
    before, masks = weights(tiny / "model"), load_file(tmp_path / "run" / FILE)
    inside = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.05 * inside)
    for name, tensor in before.items():
        mask = masks[name].bool() if name in masks else torch.zeros(tensor.shape, dtype=torch.bool)
        assert torch.equal(after[name][~mask], tensor[~mask]), name
        assert not bool((after[name][mask] == tensor[mask]).any()), f"{name}: every chosen weight decays and learns"


def test_a_mask_of_everything_is_no_mask(tiny: Path, tmp_path: Path) -> None:
    whole = replace(MASKED, mask=WeightMask(share=1.0))
    one = run_unlearn(small_config(tiny, tmp_path / "one", scope=whole, trainer=DECAYING))
    two = run_unlearn(small_config(tiny, tmp_path / "two", scope=replace(whole, mask=None), trainer=DECAYING))
    assert all(torch.equal(tensor, weights(two)[name]) for name, tensor in weights(one).items())


def test_a_resumed_run_keeps_its_mask(tiny: Path, tmp_path: Path) -> None:
    config = small_config(tiny, tmp_path / "whole", scope=MASKED, trainer=DECAYING, objective=NPO())
    whole = weights(run_unlearn(config))
    part = replace(config, out=str(tmp_path / "part"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unlearn.training.loop._Loop._milestones", _stop_after(4))
        with pytest.raises(_Stop):
            run_unlearn(part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unlearn.training.masks._attribution", lambda *_: pytest.fail("chosen again"))
        resumed = weights(run_unlearn(replace(part, resume=True)))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("launch", ["cpu2_ddp", "cpu2_fsdp"])
def test_two_processes_choose_and_train_the_same(tiny: Path, tmp_path: Path, launch: str) -> None:
    trainer = replace(DECAYING, batch=10, micro_batch=2)
    one = small_config(tiny, tmp_path / "one", scope=MASKED, trainer=trainer)
    expected = weights(run_unlearn(one))
    done = run_script("unlearn", *config_words(one, tmp_path), "--out", str(tmp_path / "two"), launch=launch)
    assert done.returncode == 0, done.stderr[-2000:]
    found, wanted = (load_file(tmp_path / name / FILE) for name in ("two", "one"))
    assert all(torch.equal(found[name], mask) for name, mask in wanted.items())
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-6, abs=2e-6)
    for name, tensor in weights(tmp_path / "two" / "model").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        if name not in wanted:
            assert torch.equal(tensor, expected[name])
        else:
            mask = wanted[name].bool()
            assert torch.equal(tensor[~mask], expected[name][~mask])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="give one of them"):
        Scope(lora=Lora(), mask=WeightMask())
    with pytest.raises(UserError, match="share is 0"):
        WeightMask(share=0.0)
    with pytest.raises(UserError, match="rows is 0"):
        WeightMask(rows=0)
