"""One trace after unlearning as data: a changed model x the effects of the one it came from."""

from __future__ import annotations

from dataclasses import dataclass, field

from lm.anatomy import Kind
from lm.errors import UserError
from lm.model import ModelSpec
from tracing.bootstrap import check_confidence
from tracing.engine.engines import EngineName

HELP = """What is left where it was stored? Trace the facts of an earlier trace again, in the model as it is after unlearning.

palimpsest retrace --before runs/trace --model.path runs/unlearn/model --out runs/retrace
accelerate launch --config_file "$(palimpsest configs accelerate/gpu8_ddp)" \\
    -m palimpsest retrace --before runs/trace --model.path MODEL
"""


@dataclass(frozen=True, kw_only=True)
class RetraceConfig:
    """A changed model, and the effects of the one it came from: facts, noise, metric and cells are those of the first trace."""

    model: ModelSpec = field(default_factory=ModelSpec)
    """The changed model."""
    before: str = "runs/trace"
    """The run folder of the first trace, or its effects.npz."""
    kinds: tuple[Kind, ...] | None = None
    """Trace only these kinds again; null traces all that were traced."""
    engine: EngineName | None = None
    """How cells are computed; null: as before."""
    memory: float = 2.0
    """Gigabytes that the wavefront may take beside the model, about; a run may go on with another number."""
    confidence: float = 0.95
    """Of the intervals of what changed."""
    seed: int = 0
    """Of the resampling."""
    out: str = "runs/retrace"
    """The run folder."""
    resume: bool = False
    """Go on with the trace in `out`: finished facts are not traced again."""

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more")
