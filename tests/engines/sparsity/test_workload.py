"""The operations of a pass are those that PyTorch counts when it runs the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.sparsity.workload import encoder_workload
from nxm_export.contract.checkpoint import read_config_file
from nxm_export.contract.families import family_of
from tests.support.tiny import write_model

torch = pytest.importorskip("torch")
BATCH, SEQUENCE = 3, 8


@pytest.mark.parametrize("name", ["bert", "albert", "distilbert", "modernbert", "nomic_bert"])
def test_the_operations_are_those_that_pytorch_counts(name: str, tmp_path: Path) -> None:
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    directory = write_model(name, tmp_path / name, intermediate=48)
    config = read_config_file(directory)
    work = encoder_workload(family_of(config), config, BATCH, SEQUENCE)
    assert work.steps is not None
    counted = sum(2 * work.tokens * product.k * product.n * product.runs for product in work.products)
    counted += sum(step.runs * step.operations for step in work.steps)

    model = transformers.AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    ids = torch.ones(BATCH, SEQUENCE, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    flops = {module: sum(found.values()) for module, found in counter.get_flop_counts().items()}
    elsewhere = sum(
        value for module, value in flops.items() if module.endswith(("pooler", "embedding_hidden_mapping_in"))
    )
    rotations = sum(value for module, value in flops.items() if module.endswith("rotary_emb"))
    assert counted == flops["Global"] - elsewhere - rotations
