"""Where is it stored? Causal mediation analysis of facts, from prompts to a plan of layers to train.

`trace(model, facts)` gives `Effects`; `choose_layers(effects, size=...)` gives a `LayerPlan`, which training consumes. Tracing
is one `Localizer` of several, each giving `LayerScores`; `combined_plan` draws a plan from all, and says if they disagree.
"""

from tracing.causal_tracing import estimate, trace
from tracing.corruption.noise import GaussianNoise
from tracing.corruption.replacement import TokenReplacement
from tracing.depth import DepthReport, unlearning_depth
from tracing.effects.agreement import Agreement, agreement
from tracing.effects.before_after import Difference, difference
from tracing.effects.effects import Effects
from tracing.effects.interaction import Interaction, interaction
from tracing.effects.layer_scores import LayerScores
from tracing.effects.roles import ROLES
from tracing.effects.table import EffectTable, Skipped
from tracing.engine.estimate import Estimate
from tracing.localizers.attribution_patching import AttributionPatching
from tracing.localizers.base import Localization, Localizer
from tracing.localizers.by_tracing import CausalTracing
from tracing.localizers.fact_lookup import FactLookup
from tracing.localizers.gradient_overlap import GradientOverlap
from tracing.localizers.weight_attribution import WeightAttribution
from tracing.plan.choose import choose_layers
from tracing.plan.combined import Agreements, combine, combined_plan, compare_all
from tracing.plan.cross_check import confirm
from tracing.plan.layer_plan import LayerPlan
from tracing.plots.pictures import Picture, plot, plot_difference, plot_localizers, plot_severed
from tracing.question.facts import Fact, facts_from_rows, load_known_facts, with_foils
from tracing.question.subjects import find_subjects
from tracing.retracing import retrace
from tracing.settings import TraceSettings, Workers

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
    "Localization",
    "Localizer",
    "Picture",
    "Skipped",
    "TokenReplacement",
    "TraceSettings",
    "WeightAttribution",
    "Workers",
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
    "plot",
    "plot_difference",
    "plot_localizers",
    "plot_severed",
    "retrace",
    "trace",
    "unlearning_depth",
    "with_foils",
]
