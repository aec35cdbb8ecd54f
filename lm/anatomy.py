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


Names = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Module names of one model family. `attn` to `mlp_out` are relative to a block.

    Where a name may differ, from block to block or between versions of transformers, all are given.
    """

    blocks: str = "model.layers"
    norm: str = "model.norm"
    attn: Names = "self_attn"
    """The modules that own the weights of attention, or of what stands in its place: those of them that a block has."""
    mlp: Names = "mlp"
    """The modules that own the weights of the MLP: those of them that a block has."""
    attn_out: Names = "self_attn"
    """The module whose output attention adds to the stream: the first that a block has."""
    mlp_out: Names = "mlp"
    """The module whose output the MLP adds to the stream: the first that a block has."""
    recurrent: Names = ()
    """Those of `attn` that keep a state in place of keys and values."""
    multiplier: str = "residual_multiplier"
    """An attribute of a block: what its modules say is multiplied by it and then added; 1 in a block without it."""
    body: str | None = None
    """What the causal model calls before its head; None: its base model."""
    norm_first: bool = False
    """The final norm is applied to the embeddings, too."""
    flat: bool = False
    """The output of `mlp_out` is `(rows * tokens, hidden)`."""
    parallel: str | bool = "use_parallel_residual"
    """Attention and MLP both read the block's input: always, never, or where the config's field of this name says so."""
    needs: tuple[tuple[str, object, str], ...] = ()
    """Fields of the config, the value that each must have, and why: with another the blocks do something else."""


_PRE_NORM = Architecture()
_POST_NORM = Architecture(attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
_EXPERTS = Architecture(
    mlp=("mlp", "block_sparse_moe"), mlp_out=("mlp", "block_sparse_moe")
)  # the latter before transformers 5
_DELTA_NET = Architecture(
    attn=("self_attn", "linear_attn"), attn_out=("self_attn", "linear_attn"), recurrent="linear_attn"
)
_GPT = Architecture(blocks="transformer.h", norm="transformer.ln_f", attn="attn", attn_out="attn")

KNOWN: dict[str, Architecture] = {
    **dict.fromkeys(
        ("olmo", "olmoe", "llama", "mistral", "ministral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), _PRE_NORM
    ),
    **dict.fromkeys(("smollm3", "gemma", "gpt_oss", "starcoder2", "glm", "nemotron", "helium", "arcee"), _PRE_NORM),
    **dict.fromkeys(("seed_oss", "deepseek_v3", "apertus", "granite"), _PRE_NORM),
    "nanochat": replace(_PRE_NORM, norm_first=True),
    **dict.fromkeys(("olmo2", "olmo3", "flex_olmo", "gemma2", "gemma3_text", "exaone4"), _POST_NORM),
    **dict.fromkeys(("mixtral", "phimoe"), _EXPERTS),
    **dict.fromkeys(("cohere", "cohere2"), replace(_PRE_NORM, parallel=True)),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text"), _DELTA_NET),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gpt_neo"), _GPT),
    "gptj": replace(_GPT, parallel=True),
    "gemma3": replace(_POST_NORM, blocks="model.language_model.layers", norm="model.language_model.norm"),
    "glm4": Architecture(attn_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"),
    # Its blocks with attention normalize what they add, those with a delta net what they read.
    "olmo_hybrid": replace(
        _DELTA_NET,
        attn_out=("linear_attn", "post_attention_layernorm"),
        mlp_out=("post_feedforward_layernorm", "mlp"),
    ),
    "lfm2": Architecture(
        norm="model.embedding_norm",
        attn=("self_attn", "conv"),
        mlp="feed_forward",
        attn_out=("self_attn", "conv"),
        mlp_out="feed_forward",
        recurrent="conv",
    ),
    # These apply dropout between the module and the stream: its output is what is added, also in training. Phi has one dropout
    # for both, Falcon, OPT and Bloom have none that is a module: what is read there is what is added where dropout is off.
    "phi3": Architecture(attn_out="resid_attn_dropout", mlp_out="resid_mlp_dropout"),
    "stablelm": Architecture(mlp_out="dropout"),
    "gpt_neox": Architecture(
        blocks="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        attn="attention",
        attn_out="post_attention_dropout",
        mlp_out="post_mlp_dropout",
    ),
    "phi": Architecture(norm="model.final_layernorm", parallel=True),
    "falcon": replace(_GPT, attn="self_attention", attn_out="self_attention", parallel="parallel_attn"),
    "opt": Architecture(
        blocks="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        mlp=("fc1", "fc2"),
        mlp_out="fc2",
        body="model.decoder",
        flat=True,
        needs=(("do_layer_norm_before", True, "its blocks normalize the stream itself after they add to it"),),
    ),
    # Their modules are given the stream and add to it themselves, so what they add is the output of the last layer inside.
    "bloom": replace(
        _GPT,
        attn="self_attention",
        attn_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        needs=(
            ("apply_residual_connection_post_layernorm", False, "its blocks add to the normalized stream"),
            ("slow_but_exact", False, "it multiplies by slices of its weights, past its modules"),
        ),
    ),
    "mpt": Architecture(
        blocks="transformer.blocks",
        norm="transformer.norm_f",
        attn="attn",
        mlp="ffn",
        attn_out="resid_attn_dropout",
        mlp_out="ffn.down_proj",
    ),
}
"""`config.model_type` -> names; an unknown family is tried with `Architecture()`. To add one: a record here and a tiny config
in tests/lm/families.py."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What one block of a loaded model has: names relative to the block, as in `Architecture`."""

    attn: tuple[str, ...]
    mlp: tuple[str, ...]
    attn_out: str
    mlp_out: str
    recurrent: bool
    multiplier: float


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The names of one loaded model's parts, and its size. Built by `anatomy_of`."""

    architecture: str
    """`config.model_type`."""
    names: Architecture
    parts: tuple[Parts, ...]
    """What each block has."""
    embedding: str
    head: str
    layers: int
    hidden: int
    vocabulary: int
    """Rows of the embedding matrix, which may be more than the tokenizer has ids for."""
    parallel: bool
    """Attention and MLP both read the block's input (GPT-NeoX, GPT-J); otherwise the MLP reads the stream after attention."""

    @property
    def blocks(self) -> str:
        return self.names.blocks

    @property
    def norm(self) -> str:
        return self.names.norm

    @property
    def known(self) -> bool:
        """Whether `KNOWN` has a record of the family; otherwise the standard names were tried."""
        return self.architecture in KNOWN

    @property
    def recurrent(self) -> tuple[int, ...]:
        """The layers that keep a state from token to token in place of keys and values."""
        return tuple(layer for layer, parts in enumerate(self.parts) if parts.recurrent)

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
        parts = self.parts[site.layer]
        return f"{block}.{parts.mlp_out if site.kind == 'mlp' else parts.attn_out}"

    def multiplier(self, site: Site) -> float:
        """By how much the output of the site's module is multiplied before it is added to the stream; 1 but in Granite."""
        self.block_path(site.layer)
        return 1.0 if site.kind == "resid" else self.parts[site.layer].multiplier

    def weight_prefix(self, layer: int, module: Module) -> tuple[str, ...]:
        """Prefixes of the parameter names that belong to a layer's `"mlp"`, its `"attn"`, or the whole block (`"all"`).

        Norms belong to the block only. Use with `name.startswith(anatomy.weight_prefix(3, "mlp"))`.
        """
        block = self.block_path(layer)
        if module == "all":
            return (f"{block}.",)
        if module not in get_args(Module):
            raise UserError(f"the module {module!r} is unknown: use one of {', '.join(get_args(Module))}")
        parts = self.parts[layer]
        return tuple(f"{block}.{name}." for name in (parts.mlp if module == "mlp" else parts.attn))

    def reads_text(self, name: str) -> bool:
        """Whether the parameter `name` has a part in reading text; those that read pictures (Gemma-3) have none."""
        return name.startswith((f"{self.blocks.rpartition('.')[0]}.", f"{self.head}."))

    def sites(self, *kinds: Kind) -> tuple[Site, ...]:
        """Every site of the given kinds (all three when none is given), layer by layer; without `EMBEDDING`."""
        return tuple(Site(kind, layer) for layer in range(self.layers) for kind in (kinds or get_args(Kind)))


def anatomy_of(model: nn.Module) -> Anatomy:
    """Name the parts of a causal language model from transformers, also inside a wrapper (PEFT, DDP, torch.compile).

    The names are those of the module that is passed in, so on a wrapped model they carry the wrapper's prefix. A family that
    `KNOWN` lacks is tried with the standard names; whether they mean what they should, `lm.check_anatomy` tells.

    Raises:
        UserError: parts that are not where they should be, or blocks that cannot be expressed.
    """
    language_model = _language_model(model)
    whole = language_model.config
    kind, config = whole.model_type, whole.get_text_config()
    names = KNOWN.get(kind, _PRE_NORM)
    for field, value, reason in names.needs:
        if getattr(config, field, value) != value:
            raise UserError(
                f"this {kind} model has {field} {getattr(config, field)}: {reason}, so what they add cannot be read or edited; "
                "use another model"
            )
    head: nn.Module | None = language_model.get_output_embeddings()  # type: ignore[no-untyped-call]
    try:
        blocks = full_name(model, names.blocks)
        prefix = blocks[: len(blocks) - len(names.blocks)]
        norm = full_name(model, prefix + names.norm)
        stack = model.get_submodule(blocks)
        if not isinstance(stack, nn.ModuleList) or len(stack) == 0:
            raise UserError(
                f"{blocks} holds no transformer blocks: load a causal language model with at least one layer"
            )
        parts = tuple(_parts_of(block, names, f"{blocks}.{layer}") for layer, block in enumerate(stack))
    except UserError as error:
        if kind in KNOWN:
            raise
        raise UserError(
            f"the architecture {kind!r} is not among the known ones, and the usual names do not fit it ({error}): use one of "
            f"{', '.join(sorted(KNOWN))}, or add its module names to KNOWN in lm/anatomy.py"
        ) from None
    flag = names.parallel
    return Anatomy(
        architecture=kind,
        names=replace(names, blocks=blocks, norm=norm),
        parts=parts,
        embedding=_name_of(model, language_model.get_input_embeddings()),
        head=_name_of(model, head),
        layers=len(stack),
        hidden=int(config.hidden_size),
        vocabulary=len(cast(nn.Embedding, language_model.get_input_embeddings()).weight),
        parallel=bool(getattr(config, flag, False)) if isinstance(flag, str) else flag,
    )


def _parts_of(block: nn.Module, names: Architecture, path: str) -> Parts:
    """What a block has of the names of its family. Raises UserError, with its dotted name, if it lacks one."""

    def found(wanted: Names) -> tuple[str, ...]:
        wanted = (wanted,) if isinstance(wanted, str) else wanted
        there = tuple(name for name in wanted if _has(block, name))
        if not there:
            raise UserError(
                f"{path} has no {' or '.join(wanted)}: mend its names in KNOWN in lm/anatomy.py if this version of transformers "
                "renamed them"
            )
        return there

    attn = found(names.attn)
    recurrent = (names.recurrent,) if isinstance(names.recurrent, str) else names.recurrent
    return Parts(
        attn=attn,
        mlp=found(names.mlp),
        attn_out=found(names.attn_out)[0],
        mlp_out=found(names.mlp_out)[0],
        recurrent=bool(set(attn) & set(recurrent)),
        multiplier=float(getattr(block, names.multiplier, 1.0)),
    )


def _has(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


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
