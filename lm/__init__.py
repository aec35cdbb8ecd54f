"""The language model under study: load it, name its parts, watch and edit its activations, prompt it.

This room knows nothing of tracing, unlearning or autoencoders; they build on it. The names below are the public ones.
"""

from lm.anatomy import EMBEDDING, KNOWN, Anatomy, Architecture, Kind, Site, anatomy_of
from lm.checks import check_anatomy, check_weights
from lm.data.rows import Question, Row
from lm.errors import UserError
from lm.forward.hooks import Captured, Edit, capture, patch
from lm.loading import load
from lm.model import LanguageModel, ModelSpec
from lm.prompts import (
    Encoded,
    PromptSpec,
    encode_pair,
    encode_prompt,
    labels,
    render,
    subject_span,
    token_span,
)
from lm.row_files import load_calibration, load_documents, load_questions, load_rows

__all__ = [
    "EMBEDDING",
    "KNOWN",
    "Anatomy",
    "Architecture",
    "Captured",
    "Edit",
    "Encoded",
    "Kind",
    "LanguageModel",
    "ModelSpec",
    "PromptSpec",
    "Question",
    "Row",
    "Site",
    "UserError",
    "anatomy_of",
    "capture",
    "check_anatomy",
    "check_weights",
    "encode_pair",
    "encode_prompt",
    "labels",
    "load",
    "load_calibration",
    "load_documents",
    "load_questions",
    "load_rows",
    "patch",
    "render",
    "subject_span",
    "token_span",
]
