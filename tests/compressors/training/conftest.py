"""A dense model that modules of tests start from."""

from pathlib import Path

import pytest

from compressors.settings import Settings
from compressors.training.compress import finetune
from tests.support import tiny
from tests.support.trained import FAST


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data and a fine-tuned dense model."""
    out = tmp_path_factory.mktemp("prepared")
    tiny.write_model("bert", out / "encoder")
    train, dev = tiny.write_data(out)
    finetune(
        out / "encoder",
        task="classification",
        train=str(train),
        dev=str(dev),
        out=out / "dense",
        settings=Settings(**FAST),
    )
    return out
