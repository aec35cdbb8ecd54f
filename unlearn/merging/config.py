"""One merge as data: a base, the models made from it, and how they become one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lm.errors import UserError
from unlearn.merging.merge import Merge, TaskArithmetic

HELP = """Unlearn by arithmetic on weights, or join several unlearned checkpoints: task vectors, TIES.

palimpsest merge --config negation --base runs/target/model --models '[runs/reinforced/model]'
palimpsest merge --config ties --base runs/target/model --models '[runs/one/model, runs/two/model]'
"""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Which checkpoints become one, and how."""

    base: str
    """The model that the others were made from: a folder, a hub id, or builtin. Its names, types and configs are kept."""
    models: tuple[str, ...]
    """The models made from it, by unlearning or by learning more."""
    method: Merge = field(default_factory=TaskArithmetic)
    """How they are merged."""
    tokenizer: str | None = None
    """Another folder or hub id for the tokenizer, for a base that ships without one."""
    save_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the saved weights; null keeps the base's."""
    out: str = "runs/merge"
    """The run folder; the result is in its sub-folder `model`."""
    resume: bool = False
    """Go on with the run in `out`: what was counted over whole models is not counted again."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("models is empty, so there is nothing to merge: name at least one checkpoint")
        self.method.check(len(self.models))
