"""Invented answers: the sampler draws what softmax says, batches do not matter, and what is no alternative is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny as tiny_model

from lm.config import parse_config
from lm.data.rows import Row
from lm.errors import UserError
from lm.loading import load
from lm.model import ModelSpec
from lm.prompts import PromptSpec
from lm.row_files import load_rows
from lm.run_folder import RunFolder
from tests.unlearn.helpers import run_here
from unlearn.alternates.base import AlternateFile
from unlearn.alternates.config import AlternatesConfig
from unlearn.alternates.invent import Sampler, filled, invent
from unlearn.alternates.stage import run_alternates
from unlearn.generation.batching import Workers, merge
from unlearn.generation.generate import generate

RAW = PromptSpec()


class Apart(Workers):
    """One of several processes, which keeps its share to itself."""

    def gather(self, mine: list[Any]) -> list[Any]:
        return mine


def test_the_sampler_draws_what_softmax_says() -> None:
    logits, draws = torch.tensor([0.0, 1.0, 3.0]), 6000
    chosen = Sampler(2.0, (7,))(logits.expand(draws, 3), range(draws), 4)
    wanted = torch.softmax(logits / 2.0, dim=0)
    counts = torch.bincount(chosen, minlength=3) / draws
    assert (counts - wanted).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_the_text_does_not_depend_on_batches_or_processes() -> None:
    model, prompts = tiny_model("olmo", seed=3), ["Where was Anna", "Zoë", "Where was Anna", "12", "Where was Anna"]
    options = {"prompt": RAW, "max_new_tokens": 8, "choose": Sampler(1.0, (1, 2))}
    together = generate(model, prompts, batch_size=8, **options)  # type: ignore[arg-type]
    assert generate(model, prompts, batch_size=1, **options) == together  # type: ignore[arg-type]
    sampled = [together[0], together[2], together[4]]
    assert len(set(sampled)) == 3, "each prompt has a sample of its own"
    shares = [generate(model, prompts, batch_size=8, workers=Apart(index, 2), **options) for index in range(2)]  # type: ignore[arg-type]
    assert merge(shares) == together
    other = generate(model, prompts, batch_size=8, **{**options, "choose": Sampler(1.0, (1, 3))})  # type: ignore[arg-type]
    assert other != together


def test_what_is_no_alternative_is_left_out_and_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(id=f"a{i}qa0", input=f"Q{i}?", output="In Lund.", task="Task1") for i in range(2)]
    script = iter([["  in  LUND. ", "Here.\nQuestion: more", "", "x"], ["here. ", "x and y"], ["There."]])
    asked: list[int] = []

    def scripted(_: object, prompts: Sequence[str], **__: object) -> list[str]:
        asked.append(len(prompts))
        return next(script)

    monkeypatch.setattr("unlearn.alternates.invent.generate", scripted)
    config = AlternatesConfig(per_row=2, attempts=3)
    found = invent(tiny_model("olmo"), rows, config)
    assert asked == [4, 2, 1]
    assert found == [["Here.", "There."], ["x", "x and y"]]


def test_the_template_takes_the_rows_texts_as_they_are() -> None:
    row = Row(id="a1qa0", input="What is {answer}?", output="{question}", task="Task1")
    assert filled("{question} / {answer} / {question}", row) == "What is {answer}? / {question} / What is {answer}?"


def test_from_a_model_to_a_file_that_is_read_back(tiny: Path, tmp_path: Path) -> None:
    config = AlternatesConfig(
        model=ModelSpec(path=str(tiny / "model"), device="cpu"),
        rows=str(tiny / "forget.jsonl"),
        template="{question} {answer}",
        per_row=2,
        max_new_tokens=6,
        out=str(tmp_path / "run"),
    )
    path = run_alternates(config)
    model, rows = load(str(tiny / "model"), device="cpu"), load_rows(str(tiny / "forget.jsonl"))
    found = AlternateFile(path=str(path)).encode(model, rows, RAW)
    assert {len(several) for several in found} <= {1, 2}
    assert RunFolder(tmp_path / "run").manifest["alternates"] == sum(len(several) for several in found)
    again = run_alternates(AlternatesConfig(**{**vars(config), "batch_size": 5, "out": str(tmp_path / "again")}))
    assert again.read_text() == path.read_text()


def test_a_run_that_was_killed_draws_only_what_is_left_and_the_same(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AlternatesConfig(
        model=ModelSpec(path=str(tiny / "model"), device="cpu"),
        rows=str(tiny / "forget.jsonl"),
        template="{question} {answer}",
        per_row=2,
        attempts=2,
        max_new_tokens=3,
        batch_size=1,
        out=str(tmp_path / "whole"),
    )
    calls: list[int] = []

    def counted(model: Any, prompts: Sequence[str], **more: Any) -> list[str]:
        calls.append(len(prompts))
        return generate(model, prompts, **more)

    monkeypatch.setattr("unlearn.alternates.invent.generate", counted)
    whole = run_alternates(config).read_text()
    drawn = [*calls]
    assert drawn[:2] == [16, 8], "12 rows twice, in parts of 16 batches"

    def killed(model: Any, prompts: Sequence[str], **more: Any) -> list[str]:
        if len(calls) == len(drawn) + 1:
            raise KeyboardInterrupt
        return counted(model, prompts, **more)

    monkeypatch.setattr("unlearn.alternates.invent.generate", killed)
    with pytest.raises(KeyboardInterrupt):
        run_alternates(replace(config, out=str(tmp_path / "killed")))
    monkeypatch.setattr("unlearn.alternates.invent.generate", counted)
    with pytest.raises(UserError, match="already holds a run"):
        run_alternates(replace(config, out=str(tmp_path / "killed")))
    calls.clear()
    path = run_alternates(replace(config, out=str(tmp_path / "killed"), resume=True))
    assert path.read_text() == whole
    assert calls == drawn[1:]
    assert path.stat().st_mode & 0o777 == 0o600
    calls.clear()
    assert run_alternates(replace(config, out=str(tmp_path / "killed"), resume=True)) == path
    assert not calls


def test_rows_without_an_alternate_are_named_once_the_others_are_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent_but_once(_: object, prompts: Sequence[str], **__: object) -> list[str]:
        return ["Elsewhere." if prompt.startswith("Ada Brill was born") else "" for prompt in prompts]

    monkeypatch.setattr("unlearn.alternates.invent.generate", silent_but_once)
    config = AlternatesConfig(
        model=ModelSpec(path=str(tiny / "model"), device="cpu"),
        rows=str(tiny / "forget.jsonl"),
        template="{question} {answer}",
        out=str(tmp_path / "run"),
    )
    with pytest.raises(UserError, match="11 of 12 rows have no alternate, p0qa0 first"):
        run_alternates(config)
    assert AlternateFile(path=str(tmp_path / "run" / "alternates.jsonl")).read() == {"p0sc1": ("Elsewhere.",)}


def test_the_script_writes_what_the_stage_writes(tiny: Path, tmp_path: Path) -> None:
    words = ["--model.path", str(tiny / "model"), "--model.device", "cpu", "--rows", str(tiny / "forget.jsonl")]
    words += ["--template", "{question} {answer}", "--per_row", "1", "--max_new_tokens", "6"]
    status, _ = run_here("alternates", *words, "--out", str(tmp_path / "script"))
    assert status == 0
    config = parse_config(AlternatesConfig, [*words, "--out", str(tmp_path / "stage")])
    assert run_alternates(config).read_text() == (tmp_path / "script" / "alternates.jsonl").read_text()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: AlternatesConfig(per_row=0), "per_row is 0"),
        (lambda: AlternatesConfig(temperature=0.0), "temperature is 0.0"),
        (lambda: AlternatesConfig(template="{question}"), "lacks {answer}"),
    ],
)
def test_impossible_settings_are_refused(build, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=words):
        build()
