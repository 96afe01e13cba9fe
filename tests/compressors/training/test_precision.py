"""Which precision training takes by itself."""

import pytest
import torch

from compressors.training.trainer import wants_bf16
from nxm_export.errors import DataError

AMD = {"cpu_name": "AMD Zen 4", "avx512_bf16": True, "amx_bf16": False}
INTEL = {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (AMD, True),
        (AMD | {"avx512_bf16": False}, False),
        (INTEL, True),
        (INTEL | {"amx_bf16": False}, False),  # hidden by a virtual machine: bfloat16 loses to float32
        ({"avx512_bf16": True}, True),  # of PyTorch that does not name the CPU
        ({"architecture": "aarch64"}, False),
    ],
)
def test_a_cpu_trains_in_bfloat16_where_it_gains_by_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert wants_bf16("auto") is expected
    assert wants_bf16("bf16")  # what is asked for is done all the same
    assert not wants_bf16("fp32")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(DataError, match="precision must be one of auto, fp32, bf16, got 'half'"):
        wants_bf16("half")
