"""Where activations come from, as configs name it: text of five kinds, or activations that are already in files.

Each is a frozen dataclass on one axis (`Source`, see `lm.config`); `open` gives the documents. Texts from the hub are
read through `datasets` without code from the hub. No language model is touched here.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from lm.anatomy import Site
from lm.builtin.knowledge import LABELED, GeneralFact
from lm.data.files import find_files, read_file, read_text, text_column
from lm.errors import UserError, one_line
from lm.prompts import PromptSpec, render
from sae.activations.batch import ActivationStream
from sae.activations.documents import Documents, Listed, Streamed

Part = Literal["forget", "retain", "calibration", "held_out", "unseen", "general", "all"]
Format = Literal["raw", "chat"]
Form = Literal["statement", "question", "chat", "labeled"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Something that activations come from: an axis."""

    config_axis: ClassVar[bool] = True

    def described(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"kind": type(self).__name__, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class NoSource(Source):
    """No activations: for `held_out`, where nothing is to be evaluated."""


@dataclass(frozen=True, kw_only=True)
class TextSource(Source, ABC):
    """Something that holds documents."""

    @abstractmethod
    def open(self, tokenizer: PreTrainedTokenizerBase) -> Documents:
        """The documents. Raises UserError for what is missing, unreadable or empty."""


@dataclass(frozen=True, kw_only=True)
class Datasets(TextSource):
    """A dataset of the hub, or a folder that `datasets` reads (a clone of one, or what `save_to_disk` wrote)."""

    path: str
    """A hub id, or a folder."""
    name: str | None = None
    """The configuration, where a dataset has several (`wikitext-103-raw-v1`)."""
    split: str = "train"
    """The split."""
    column: str = "text"
    """The column that holds the text."""
    revision: str | None = None
    """A commit, branch or tag of a hub id."""
    streaming: bool = True
    """Read as it goes, instead of downloading it (and writing it into the cache of `datasets`) first."""
    shuffle_block: int = 10_000
    """When streaming, documents are permuted within blocks of so many, which are held in memory."""

    def __post_init__(self) -> None:
        if self.shuffle_block < 1:
            raise UserError(f"shuffle_block {self.shuffle_block} is too small: give 1 or more documents")

    def open(self, tokenizer: PreTrainedTokenizerBase) -> Documents:
        try:
            import datasets
        except ImportError as problem:
            missing = (problem.name or "").partition(".")[0] == "datasets"
            state = "is not installed" if missing else f"cannot be imported ({problem})"
            raise UserError(f"datasets {state}: pip install 'palimpsest-unlearning[sae]'") from None
        label = f"{self.path} ({self.split})"
        with _said(f"the dataset {self.path}, split {self.split}, cannot be read, check name, split and connection"):
            loaded = self._load(datasets)
        if isinstance(loaded, datasets.IterableDataset):
            return Streamed(label, lambda start: self._records(loaded, start), block=self.shuffle_block)
        if self.column not in loaded.column_names:
            raise _no_column(label, self.column, loaded.column_names)
        if not len(loaded):
            raise UserError(f"{label} holds no documents: give a split with at least one")
        table = loaded.select_columns([self.column])
        return Listed(label, len(table), lambda numbers: table[list(numbers)][self.column])

    def _load(self, datasets: Any) -> Any:
        folder = Path(self.path).expanduser()
        if folder.is_dir() and any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if self.split not in saved:
                raise UserError(f"{self.path} has no split {self.split!r}: it has {', '.join(saved)}")
            return saved[self.split]
        return datasets.load_dataset(
            str(folder) if folder.is_dir() else self.path,
            self.name,
            split=self.split,
            revision=None if folder.is_dir() else self.revision,
            streaming=self.streaming,
            trust_remote_code=False,
        )

    def _records(self, dataset: Any, start: int) -> Iterator[object]:
        """The texts of a streamed dataset from one place on. Its own order is kept: `skip` is exact."""
        label = f"{self.path} ({self.split})"
        with _said(f"reading {self.path} from the hub failed, check the connection and resume"):
            for record in dataset.skip(start) if start else dataset:
                if self.column not in record:
                    raise _no_column(label, self.column, record)
                yield record[self.column]


@dataclass(frozen=True, kw_only=True)
class TextFiles(TextSource):
    """Local text, JSON-lines, JSON or Parquet files, read into memory (for more than that, see Datasets)."""

    path: str
    """A file, or a folder: its files of the first kind found of .jsonl, .parquet, .json and .txt, by name."""
    column: str = "text"
    """The column that holds the text, in files that have columns."""
    new_document: str | None = None
    r"""In .txt files: a line that matches this regular expression begins a document. Null: a file is one document; an
    empty pattern: a line is. WikiText: ` = [^=].* = $`."""

    def open(self, tokenizer: PreTrainedTokenizerBase) -> Documents:
        texts: list[str] = []
        kinds = (".jsonl", ".parquet", ".json", ".txt")
        for file in find_files(Path(self.path).expanduser(), suffixes=kinds, preferred=kinds):
            if file.suffix.lower() == ".txt":
                text = (
                    read_text(file).replace("\r\n", "\n").replace("\r", "\n")
                )  # as one line end, wherever it was written
                texts += _documents(text, self.new_document)
            else:
                texts += [text_column(record, self.column, blank=True) for record in read_file(file)]
        return _listed(self.path, texts)


@dataclass(frozen=True, kw_only=True)
class Rows(TextSource):
    """Rows in LUME's schema: each document is a prompt with its output, as a model is trained on it."""

    path: str
    """A .jsonl, .json or .parquet file with columns `input` and `output`, or a folder of them."""
    format: Format = "raw"
    """raw: `input + " " + output`; chat: the tokenizer's template round the input, then the output."""

    def __post_init__(self) -> None:
        _known(self.format, Format, "format")

    def open(self, tokenizer: PreTrainedTokenizerBase) -> Documents:
        records = [record for file in find_files(Path(self.path).expanduser()) for record in read_file(file)]
        pairs = [(text_column(record, "input"), text_column(record, "output")) for record in records]
        return _listed(self.path, joined(pairs, self.format, tokenizer))


@dataclass(frozen=True, kw_only=True)
class Builtin(TextSource):
    """The built-in world: its rows as documents, its general facts in the forms asked for."""

    part: Part = "all"
    """forget, retain, calibration, held_out, unseen (these two together: what no built-in model saw), general, or all that
    the memorizing model was trained on."""
    format: Format = "raw"
    """Of the rows: raw, or chat."""
    forms: tuple[Form, ...] = ("statement",)
    """Of the general facts, each form a text of its own: statement (every wording of it); question (`question + " " +
    answer`); chat (the tokenizer's template round the question, then the answer); labeled (`Question: … Answer: …`, of the
    half of the facts that the models saw in that form). A form that is named several times comes as often."""

    def __post_init__(self) -> None:
        _known(self.part, Part, "part")
        _known(self.format, Format, "format")
        for form in self.forms:
            _known(form, Form, "form")
        if not self.forms:
            raise UserError(f"forms is empty: name at least one of {', '.join(get_args(Form))}")
        if self.forms != ("statement",) and self.part not in ("general", "all"):
            raise UserError(
                f"forms is {list(self.forms)} but part is {self.part}, which holds no general facts: "
                "leave forms out, or take the part general or all"
            )

    def open(self, tokenizer: PreTrainedTokenizerBase) -> Documents:
        from lm.builtin import world

        built = world.build()
        more = {"unseen": built.unseen, "all": (*built.forget, *built.retain), "general": ()}
        rows = more[self.part] if self.part in more else built.parts[self.part]
        texts = joined([(row.input, row.output) for row in rows], self.format, tokenizer)
        if self.part in ("general", "all"):
            for form in self.forms:
                texts += _general(built.general, form, tokenizer)
        return _listed(f"builtin:{self.part}", texts)


@dataclass(frozen=True, kw_only=True)
class Texts(TextSource):
    """Documents that are at hand: for notebooks and tests."""

    texts: tuple[str, ...]
    """The documents."""

    def open(self, tokenizer: PreTrainedTokenizerBase) -> Documents:
        return _listed("the texts given", self.texts)

    def described(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, "documents": len(self.texts)}


@dataclass(frozen=True, kw_only=True)
class MadeActivations(Source, ABC):
    """Something that makes activations itself, from neither text nor files (`sae.synthetic.Synthetic`)."""

    @abstractmethod
    def stream(
        self,
        sites: Sequence[Site],
        *,
        batch_tokens: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> ActivationStream:
        """Its batches of `batch_tokens` tokens, rows `rank::world` of them. No site means all there are."""


@dataclass(frozen=True, kw_only=True)
class ActivationFiles(Source):
    """Activations that are there already: a cache that `write_cache` made, or plain safetensors files."""

    path: str
    """The cache's folder; or a .safetensors file, or a folder of them."""
    site: str = "resid.0"
    """Of plain files: the site that the values are of."""
    key: str = "activations"
    """Of plain files: the name of the `(tokens, hidden)` tensor."""


def _documents(text: str, new_document: str | None) -> list[str]:
    """A text as one document, or one from each line that matches the pattern (see `TextFiles`)."""
    if new_document is None:
        return [text]
    try:
        pattern = re.compile(new_document)
    except re.error as error:
        raise UserError(f"new_document {new_document!r} is no regular expression: {one_line(error)}") from error
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if pattern.match(line) and documents[-1]:
            documents.append([])
        documents[-1].append(line)
    return [joined for lines in documents if (joined := "\n".join(lines)).strip()]


def _general(facts: Sequence[GeneralFact], form: Form, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The general facts as whole texts in one form."""
    if form == "statement":
        return [statement for fact in facts for statement in fact.statements]
    if form == "labeled":
        pairs = [(LABELED.format(question=fact.question), fact.answer) for fact in facts if fact.labeled]
    else:
        pairs = [(fact.question, fact.answer) for fact in facts]
    return joined(pairs, "chat" if form == "chat" else "raw", tokenizer)


def joined(pairs: Sequence[tuple[str, str]], form: Format, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Pairs of a prompt and its output as documents, as a model is trained on them."""
    spec = PromptSpec(format=form)
    return [f"{render(tokenizer, prompt, spec)}{spec.prefix}{output}" for prompt, output in pairs]


def _listed(name: str, texts: Sequence[str]) -> Listed:
    if not any(texts):
        raise UserError(f"{name} holds no text: give at least one document that is not empty")
    return Listed.of(name, texts)


def _known(value: str, choices: Any, what: str) -> None:
    if value not in get_args(choices):
        raise UserError(f"the {what} {value!r} is unknown: use one of {', '.join(get_args(choices))}")


def _no_column(label: str, column: str, known: Any) -> UserError:
    return UserError(f"{label} has no column {column!r}, it has {', '.join(known)}: set column")


class _said:
    """Turns what `datasets` raises while loading or reading into one sentence."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        raise UserError(f"{self.sentence}: {one_line(error)}") from error
