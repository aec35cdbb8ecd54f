"""Perplexity on general text: by hand, beside logits written out, and through the stage."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lm.config import parse_config
from lm.errors import UserError
from lm.loading import load
from sae.activations.sources import Texts
from unlearn.evaluation.config import EvaluateConfig
from unlearn.evaluation.evaluate import evaluate
from unlearn.evaluation.scores.base import Statistics, TextLoss
from unlearn.evaluation.scores.general import GeneralPerplexity
from unlearn.evaluation.stage import run_evaluate
from unlearn.general_text import GeneralText

TEXTS = ("Ada Brill was born in 1000 near Varn.", "Where was Bo Karsk born? near Varn")


def test_by_hand() -> None:
    statistics = Statistics(general=TextLoss(nats=(2.0, 4.0), tokens=(1, 3)))
    assert statistics.of(GeneralPerplexity()) == math.exp(6 / 4)
    assert statistics.examples_of(GeneralPerplexity()) == {"piece 0": math.exp(2.0), "piece 1": math.exp(4 / 3)}
    assert Statistics().of(GeneralPerplexity()) is None


def test_it_is_that_of_the_logits(tiny: Path, tmp_path: Path) -> None:
    model = load(str(tiny / "model"), device="cpu")
    nats, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([*model.tokenizer(text)["input_ids"], model.tokenizer.eos_token_id])
        for piece in ids.split(8):
            if len(piece) > 1:
                with torch.no_grad():
                    logprob = model.model(input_ids=piece[None]).logits[0].log_softmax(-1)
                nats -= float(logprob[:-1].gather(1, piece[1:, None]).sum())
                count += len(piece) - 1
    asked = {"general": GeneralText(source=Texts(texts=TEXTS), longest=8), "scores": ["general_perplexity"]}
    result = evaluate(model, [], [], store=tmp_path, batch_size=2, **asked)  # type: ignore[arg-type]
    assert result.values["general_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert evaluate(model, [], [], store=tmp_path, **asked).values == result.values  # type: ignore[arg-type]
    other = GeneralText(source=Texts(texts=TEXTS[:1]), longest=8)
    with pytest.raises(UserError, match="holds the perplexity of another text"):
        evaluate(model, [], [], store=tmp_path, general=other, scores=["general_perplexity"])
    with pytest.raises(UserError, match="needs general texts and there are none"):
        evaluate(model, [], [], scores=["general_perplexity"])


def test_the_stage_reads_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[0])
    words = [
        "--model.path",
        str(tiny / "model"),
        "--model.device",
        "cpu",
        "--utility",
        "null",
        "--members",
        "null",
        "--nonmembers",
    ]
    words += ["null", "--forget", str(tiny / "forget.jsonl"), "--retain", str(tiny / "retain.jsonl"), "--scores"]
    words += ["[general_perplexity]", "--general", "TextFiles", "--general.path", str(tmp_path / "text.txt")]
    result = run_evaluate(parse_config(EvaluateConfig, [*words, "--out", str(tmp_path / "run")]))
    written = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert written["general_perplexity"] == result.values["general_perplexity"]
    with pytest.raises(UserError, match="general is ActivationFiles, which holds no text"):
        parse_config(EvaluateConfig, ["--general", "ActivationFiles", "--general.path", "x"])
