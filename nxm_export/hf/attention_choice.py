"""Which function computes a model's attention, and whether the model really calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from nxm_export.errors import ArtifactError

if TYPE_CHECKING:
    import torch

    from nxm_export.hf.protocols import HasAttention


def choose_attention(model: torch.nn.Module, name: str) -> None:
    """Let `model` compute attention by the function that transformers knows as `name`.

    transformers only logs that a model ignores the choice; quantizers in the function would then never run. This raises
    `ArtifactError`, for a model inside a wrapper, too, of which transformers does not look.
    """
    import transformers

    cast("HasAttention", model).set_attn_implementation(name)
    parts = [cast("HasAttention", part) for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
    ignoring = {
        type(part).__name__
        for part in parts
        if not part._can_set_attn_implementation() or part.config._attn_implementation != name
    }
    if ignoring or not parts:
        raise ArtifactError(
            f"transformers {transformers.__version__} has attention of its own in "
            f"{', '.join(sorted(ignoring)) or type(model).__name__}, and ignores the one that was chosen ({name}); "
            "use a version that `constraints.txt` names, or declare the family without an attention interface"
        )
