"""Where is it stored? Causal mediation analysis of facts, from prompts to a plan of layers to train.

`trace(model, facts)` gives `Effects`; `choose_layers(effects, size=...)` gives a `LayerPlan`, which training consumes. Tracing
is one `Localizer` of several, each giving `LayerScores`; `combined_plan` draws a plan from all, and says if they disagree.
"""

from tracing.agreement import Agreement, agreement
from tracing.attribution_patching import AttributionPatching
from tracing.choose import choose_layers
from tracing.combine import Agreements, combine, combined_plan, compare_all
from tracing.confirm import confirm
from tracing.corruption import GaussianNoise
from tracing.cost import Estimate
from tracing.depth import DepthReport, unlearning_depth
from tracing.difference import Difference, difference
from tracing.effects import ROLES, Effects, EffectTable, Skipped
from tracing.facts import Fact, facts_from_rows, load_known_facts, with_foils
from tracing.interaction import Interaction, interaction
from tracing.localizer import CausalTracing, Localizer
from tracing.lookup import FactLookup
from tracing.names import find_subjects
from tracing.overlap import GradientOverlap
from tracing.plan import LayerPlan
from tracing.replacement import TokenReplacement
from tracing.retrace import retrace
from tracing.scores import LayerScores
from tracing.tracer import estimate, trace
from tracing.weights import WeightAttribution

__all__ = [
    "ROLES",
    "Agreement",
    "Agreements",
    "AttributionPatching",
    "CausalTracing",
    "DepthReport",
    "Difference",
    "EffectTable",
    "Effects",
    "Estimate",
    "Fact",
    "FactLookup",
    "GaussianNoise",
    "GradientOverlap",
    "Interaction",
    "LayerPlan",
    "LayerScores",
    "Localizer",
    "Skipped",
    "TokenReplacement",
    "WeightAttribution",
    "agreement",
    "choose_layers",
    "combine",
    "combined_plan",
    "compare_all",
    "confirm",
    "difference",
    "estimate",
    "facts_from_rows",
    "find_subjects",
    "interaction",
    "load_known_facts",
    "retrace",
    "trace",
    "unlearning_depth",
    "with_foils",
]
