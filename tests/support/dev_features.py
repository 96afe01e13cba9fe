"""What engines and checkpoints are compared on in tests."""

from __future__ import annotations

from pathlib import Path

from nxm_export.contract.io_spec import load_spec
from nxm_export.data.examples import encode, index_of, load_raw, with_classes
from nxm_export.data.features import Features
from nxm_export.data.tokenization import load_tokenizer


def dev_features(checkpoint: Path, directory: Path) -> list[Features]:
    """The held-out samples of a tiny checkpoint in tokens, as the graph or engine in `directory` takes them."""
    spec = load_spec(directory)
    examples = with_classes(load_raw(str(checkpoint.parent / "dev.tsv"), "dev"), index_of(spec.labels))
    return encode(load_tokenizer(directory), examples, spec.max_length, spec.inputs)
