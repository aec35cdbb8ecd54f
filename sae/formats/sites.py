"""What a file says about where its activations come from: hook names in two spellings, and the facts of its training.

`hook_name` is TransformerLens' spelling (`blocks.3.hook_resid_post`), `hf_hook_name` the module whose output it is
(`model.layers.3`). On models that normalize before adding (OLMo-2, Gemma-2) both name what is added, as a `Site` does.
These are names only: nothing here opens a file or looks a module up by a name from a file.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from lm.anatomy import EMBEDDING, Anatomy, Kind, Site
from lm.errors import UserError

_HOOKS: dict[Kind, str] = {"resid": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out"}
_NAME = re.compile(r"blocks\.(\d{1,6})\.(hook_resid_pre|hook_resid_post|hook_mlp_out|hook_attn_out)")


def hook_name(site: Site) -> str:
    """TransformerLens' name of a site; the stream before block 0 is `blocks.0.hook_resid_pre`."""
    return "blocks.0.hook_resid_pre" if site == EMBEDDING else f"blocks.{site.layer}.{_HOOKS[site.kind]}"


def site_of(name: str) -> Site:
    """The site that a TransformerLens hook name means. Raises UserError for hooks inside attention or the MLP."""
    parts = _NAME.fullmatch(name) if isinstance(name, str) else None
    if not parts:
        raise UserError(
            f"the hook name {name!r:.80} is no site of the residual stream: this project knows hook_resid_pre, "
            f"hook_resid_post, hook_mlp_out and hook_attn_out of blocks.<layer>"
        )
    layer, hook = int(parts[1]), parts[2]
    if hook == "hook_resid_pre":
        return Site("resid", layer - 1)
    return Site(next(kind for kind, spelled in _HOOKS.items() if spelled == hook), layer)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where an autoencoder's activations came from and how it did; what is None is left out of the file.

    The names are those that SAELens understands or writes, but for the last four, which it carries along.
    """

    model_name: str | None = None
    dataset_path: str | None = None
    context_size: int | None = None
    prepend_bos: bool | None = None
    exclude_special_tokens: bool | list[int] | None = None
    """True, or the token ids that were masked."""
    l0: float | None = None
    """Mean number of active features a token, with the exported rule."""
    num_dead_features: int | None = None
    training_tokens: int | None = None
    """Tokens seen."""
    explained_variance: float | None = None
    git: str | None = None
    config_hash: str | None = None

    def metadata(self, site: Site, anatomy: Anatomy | None = None) -> dict[str, Any]:
        """All of it with the site's two names, for `save_autoencoder(..., metadata=...)`."""
        facts = {name: value for name, value in asdict(self).items() if value is not None}
        facts |= {"hook_name": hook_name(site), "hook_layer": max(site.layer, 0)}
        if anatomy is not None and site != EMBEDDING:
            facts["hf_hook_name"] = anatomy.module_path(site)
        return facts
