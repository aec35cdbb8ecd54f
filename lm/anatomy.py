"""Where each architecture keeps its blocks, attention, MLP, final norm and head, and what a `Site` means in it.

A site names a *residual contribution*: what a block adds to the residual stream. On models that normalize a
module's output before adding it (OLMo-2, OLMo-3, Gemma-2, Gemma-3) that is the output of the norm, not of the
module. This module only knows names; `lm.forward.hooks` reads and edits the values, and `lm.checks` tests on a loaded model
that the names are right. It never changes a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from torch import nn
from transformers import PreTrainedModel

from lm.errors import UserError

Kind = Literal["resid", "mlp", "attn"]
Module = Literal["mlp", "attn", "all"]


@dataclass(frozen=True, order=True)
class Site:
    """A place in the residual stream; every site holds a `(batch, tokens, hidden)` tensor.

    `Site("resid", l)` is the stream after block `l`; `Site("mlp", l)` and `Site("attn", l)` are what that MLP or
    attention adds to it. Layers count from 0.
    """

    kind: Kind
    layer: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"the site kind {self.kind!r} is unknown: use one of {', '.join(get_args(Kind))}")

    def __str__(self) -> str:
        return "the embedding" if self == EMBEDDING else f"{self.kind} at layer {self.layer}"


EMBEDDING = Site("resid", -1)
"""The stream before block 0: exactly what block 0 reads, so after position embeddings (GPT-2) and scaling (Gemma)."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Module names of one model family. `attn` to `mlp_out` are relative to a block.

    `attn` and `mlp` own the weights; the outputs of `attn_out` and `mlp_out` are what is added to the stream.
    """

    blocks: str = "model.layers"
    norm: str = "model.norm"
    attn: str = "self_attn"
    mlp: str = "mlp"
    attn_out: str = "self_attn"
    mlp_out: str = "mlp"


_PRE_NORM = Architecture()
_POST_NORM = Architecture(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")

KNOWN: dict[str, Architecture] = {
    "olmo": _PRE_NORM,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "olmoe": _PRE_NORM,
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    # Phi-3 and GPT-NeoX apply dropout between the module and the stream: its output is what is added, also in training.
    "phi3": Architecture(attn_out="resid_attn_dropout", mlp_out="resid_mlp_dropout"),
    "gpt2": Architecture(
        blocks="transformer.h",
        norm="transformer.ln_f",
        attn="attn",
        attn_out="attn",
    ),
    "gpt_neox": Architecture(
        blocks="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        attn="attention",
        attn_out="post_attention_dropout",
        mlp_out="post_mlp_dropout",
    ),
}
"""`config.model_type` -> names. To add a family: a record here and a tiny config in tests/lm/families.py."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The names of one loaded model's parts, and its size. Built by `anatomy_of`."""

    architecture: str
    """`config.model_type`, a key of `KNOWN`."""
    names: Architecture
    embedding: str
    head: str
    layers: int
    hidden: int
    vocabulary: int
    """Rows of the embedding matrix, which may be more than the tokenizer has ids for."""
    parallel: bool
    """Attention and MLP both read the block's input (GPT-NeoX); otherwise the MLP reads the stream after attention."""

    @property
    def blocks(self) -> str:
        return self.names.blocks

    @property
    def norm(self) -> str:
        return self.names.norm

    def block_path(self, layer: int) -> str:
        """The dotted name of a block. Raises UserError when there is no such layer."""
        if not 0 <= layer < self.layers:
            raise UserError(
                f"layer {layer} does not exist: this {self.architecture} model has layers 0 to {self.layers - 1}"
            )
        return f"{self.blocks}.{layer}"

    def module_path(self, site: Site) -> str:
        """The dotted name of the module whose *output* is the site.

        `EMBEDDING` is no module's output but the *input* of block 0, so it is refused here; `lm.forward.hooks` handles it.
        """
        block = self.block_path(site.layer)
        if site.kind == "resid":
            return block
        return f"{block}.{self.names.mlp_out if site.kind == 'mlp' else self.names.attn_out}"

    def weight_prefix(self, layer: int, module: Module) -> tuple[str, ...]:
        """Prefixes of the parameter names that belong to a layer's `"mlp"`, its `"attn"`, or the whole block (`"all"`).

        Norms belong to the block only. Use with `name.startswith(anatomy.weight_prefix(3, "mlp"))`.
        """
        block = self.block_path(layer)
        if module == "all":
            return (f"{block}.",)
        if module not in get_args(Module):
            raise UserError(f"the module {module!r} is unknown: use one of {', '.join(get_args(Module))}")
        return (f"{block}.{self.names.mlp if module == 'mlp' else self.names.attn}.",)

    def sites(self, *kinds: Kind) -> tuple[Site, ...]:
        """Every site of the given kinds (all three when none is given), layer by layer; without `EMBEDDING`."""
        return tuple(Site(kind, layer) for layer in range(self.layers) for kind in (kinds or get_args(Kind)))


def known_architecture(model_type: str) -> Architecture:
    """The names of a model family by `config.model_type`. Raises UserError with the known list and how to add one."""
    if model_type not in KNOWN:
        raise UserError(
            f"the architecture {model_type!r} is unknown (known: {', '.join(sorted(KNOWN))}): to add it, give its "
            "module names to KNOWN in lm/anatomy.py and a tiny config to tests/lm/families.py, and run pytest tests/lm"
        )
    return KNOWN[model_type]


def anatomy_of(model: nn.Module) -> Anatomy:
    """Name the parts of a causal language model from transformers, also inside a wrapper (PEFT, DDP, torch.compile).

    The names are those of the module that is passed in, so on a wrapped model they carry the wrapper's prefix.
    """
    language_model = _language_model(model)
    config = language_model.config
    head: nn.Module | None = language_model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = known_architecture(config.model_type)
    blocks = full_name(model, names.blocks)
    prefix = blocks[: len(blocks) - len(names.blocks)]
    stack = model.get_submodule(blocks)
    if not isinstance(stack, nn.ModuleList) or len(stack) == 0:
        raise UserError(f"{blocks} holds no transformer blocks: load a causal language model with at least one layer")
    return Anatomy(
        architecture=config.model_type,
        names=replace(names, blocks=blocks, norm=prefix + names.norm),
        embedding=_name_of(model, language_model.get_input_embeddings()),
        head=_name_of(model, head),
        layers=len(stack),
        hidden=int(config.hidden_size),
        vocabulary=len(cast(nn.Embedding, language_model.get_input_embeddings()).weight),
        parallel=bool(getattr(config, "use_parallel_residual", False)),
    )


def _language_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, inside whatever wraps it."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UserError(f"{type(model).__name__} holds no transformers model: load one with lm.load")


def _name_of(model: nn.Module, part: nn.Module | None) -> str:
    for name, module in model.named_modules():
        if module is part:
            return str(name)
    raise UserError(f"{type(model).__name__} has no language-model head: load it as a causal language model")


def full_name(model: nn.Module, name: str) -> str:
    """The dotted name under which `model` holds the module `name`: itself, or with a wrapper's prefix before it."""
    endings = [full for full, _ in model.named_modules() if full == name or full.endswith(f".{name}")]
    if not endings:
        raise UserError(
            f"{type(model).__name__} has no module {name}: load it as a causal language model, or mend its names in "
            "KNOWN in lm/anatomy.py if this version of transformers renamed them"
        )
    return str(min(endings, key=len))


def module_at(model: nn.Module, name: str) -> nn.Module:
    """The module at a dotted name, also when `model` was wrapped (PEFT, DDP) after it was loaded."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_submodule(full_name(model, name))
