"""The least memory of a run, on graphs small enough to count by hand."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from nxm_export.graph.run_memory import run_memory

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
ATTENTION = """
m (float[batch, sequence, 8] x) => (float[batch, sequence, 8] y)
    <float[batch, 8, sequence] turned, float[batch, sequence, sequence] scores,
     float[batch, sequence, sequence] probabilities>
{
    turned = Transpose <perm = [0, 2, 1]> (x)
    scores = MatMul (x, turned)
    probabilities = Softmax (scores)
    y = MatMul (probabilities, x)
}
"""
FEED_FORWARD = """
m (float[batch, sequence, 8] x) => (float[batch, sequence, 8] y)
    <float[8, 32] up = {WEIGHT}, float[32, 8] down = {WEIGHT},
     float[batch, sequence, 32] wide, float[batch, sequence, 32] curved, float[batch, sequence, 8] narrow>
{
    wide = MatMul (x, up)
    curved = Gelu (wide)
    narrow = MatMul (curved, down)
    y = Add (narrow, x)
}
""".replace("{WEIGHT}", "{" + ", ".join(["0"] * 256) + "}")
FUSED = """
m (float[batch, sequence, 8] x) => (float[batch, sequence, 8] y)
{
    y = com.microsoft.MultiHeadAttention <num_heads = 2> (x, x, x)
}
"""
ONNX_ATTENTION = ("com.microsoft.MultiHeadAttention <num_heads = 2>", "Attention <q_num_heads = 2>")
QUANTIZED = """
m (float[batch, sequence, 8] x) => (float[batch, sequence, 8] y)
    <float scale = {1}, int8 zero = {0}, float[batch, sequence, 8] a, int8[batch, sequence, 8] codes,
     float[batch, sequence, 8] b>
{
    a = Relu (x)
    codes = QuantizeLinear (a, scale, zero)
    b = DequantizeLinear (codes, scale, zero)
    y = Mul (b, b)
}
"""


def graph(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(HEAD + text))


@pytest.mark.parametrize(
    ("text", "scores", "expected"),
    [
        # scores of 4 x 5 x 5 beside the result of 4 x 5 x 8; softmax works in place
        (ATTENTION, True, 4 * (4 * 25 + 4 * 40)),
        (ATTENTION, False, 4 * 4 * 40),
        # the wide value beside the narrow one; GELU works in place, and the sum, too
        (FEED_FORWARD, True, 4 * (4 * 5 * 32 + 4 * 40)),
        # the result, and the scores of two heads inside the operator
        (FUSED, True, 4 * (4 * 40 + 4 * 2 * 25)),
        (FUSED, False, 4 * 4 * 40),
        (FUSED.replace(*ONNX_ATTENTION), True, 4 * (4 * 40 + 4 * 2 * 25)),
        # `a` is the most: its codes take a quarter, and are read where they lie
        (QUANTIZED, True, 4 * 4 * 40),
    ],
)
def test_the_largest_set_of_living_values_is_counted(text: str, scores: bool, expected: int) -> None:
    assert run_memory(graph(text), 4, 5, scores=scores) == expected


def test_scores_grow_with_the_square_of_the_length_and_all_else_with_the_length() -> None:
    model = graph(ATTENTION)
    with_scores = [run_memory(model, 1, length, scores=True) for length in (512, 1024)]
    without = [run_memory(model, 1, length, scores=False) for length in (512, 1024)]
    assert with_scores[1] > 3.9 * with_scores[0]
    assert without[1] == 2 * without[0]


def test_what_the_file_does_not_say_counts_nothing() -> None:
    text = "m (float[batch, n] x) => (float[batch, k] y) { a = Relu (x)\n y = Relu (a) }"
    assert run_memory(graph(text), 4, 5, scores=True) == 0
