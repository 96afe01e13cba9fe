"""A model that keeps attention of its own is told from one that runs what was chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from compressors import distributed
from compressors.models import load_model, resolve
from compressors.quantization.prepare_bake import use_int8_attention
from engines.reference.attention import use_blocked_attention
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError
from nxm_export.hf.finite_masks import use_finite_masks
from nxm_export.hf.model_loading import load_task_model
from tests.support import tiny
from tests.support.variants import variants


def _int8(model: torch.nn.Module) -> None:
    config = {"num_hidden_layers": tiny.LAYERS, "hidden_size": tiny.HIDDEN, "intermediate_size": tiny.INTERMEDIATE}
    plan = FAMILIES["bert"].uniform_plan(config, WeightSpec.parse("2:4+W8"), placement="attention")
    use_int8_attention(model, FAMILIES["bert"], plan, config)


@pytest.mark.parametrize("choose", [use_blocked_attention, use_finite_masks, _int8])
@pytest.mark.parametrize("task", ["classification", "embedding"])
@pytest.mark.parametrize("family", variants(["mpnet", "deberta-v2"], ("mpnet",)))
def test_a_choice_that_is_ignored_is_an_error(
    family: str, task: str, choose: Callable[[torch.nn.Module], None], tmp_path: Path
) -> None:
    """transformers logs a line, and of a model inside a wrapper (`embedding`) not even that."""
    model = load_task_model(tiny.write_model(family, tmp_path / "model", head=task), TASKS[task])
    with pytest.raises(ArtifactError, match=r"has attention of its own in .*and ignores the one that was chosen"):
        choose(model)


@pytest.mark.parametrize("family", variants(FAMILIES, ("bert", "mpnet", "deberta-v2")))
def test_a_family_loads_where_there_is_a_gpu(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There attention is fused for training, by a family that has that; transformers refuses to load another so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    source = resolve(tiny.write_model(family, tmp_path / "model", head="classification"))
    model = load_model(source, TASKS["classification"])
    parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
    fused = {part.config._attn_implementation for part in parts}
    assert fused == {"sdpa" if FAMILIES[family].attention.interface else "eager"}
