"""What 2:4 can gain, against arithmetic by hand; bounds that hold for any model, GPU and shape; figures of GPUs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.sparsity.gain import gain_bound, gain_estimate
from engines.sparsity.gain_report import GainReport, first_shape, gain_report
from engines.sparsity.gpu_figures import GpuFigures, all_figures, figures_of
from engines.sparsity.targets import compute_capability_of
from engines.sparsity.workload import Step, WeightProduct, Workload, encoder_workload, planned_workload
from nxm_export.contract.encoder_family import Family
from nxm_export.contract.families import FAMILIES
from nxm_export.errors import EngineError

BERT_BASE: dict[str, object] = {
    "model_type": "bert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
A100 = figures_of("A100")


def bert_base(batch: int, sequence: int) -> Workload:
    return encoder_workload(FAMILIES["bert"], BERT_BASE, batch, sequence)


def report(gpu: str, backend: str = "trt", version: str | None = None) -> GainReport:
    return gain_report("bert", bert_base(32, 128), gpu, backend, version)


def test_bert_base_on_an_a100_is_what_arithmetic_by_hand_says() -> None:
    """32 x 128 is 4096 tokens; the A100 has 312 TFLOPS FP16, 624 TOPS INT8 and 2039 GB/s."""
    work = bert_base(32, 128)
    memory, cache = gain_estimate(work, A100).memory, gain_estimate(work, A100).cache
    # 2 * 4096 * 768 * 768 = 4.832e9 operations: 7.743 us, and half of that at 2:4. All reading and writing takes
    # (768 * 768 + 4096 * 1536) / 2039e9 = 3.375 us, which is less. FFN matrices are four times as large.
    for product in memory.products:
        times = 30.973 if product.name.startswith("ffn") else 7.743
        assert product.int8_us == pytest.approx(times, abs=1e-3)
        assert product.sparse_us == pytest.approx(times / 2, abs=1e-3)
    assert {product.sparse_limit for product in memory.products} == {"arithmetic"}
    # 48 * 7.743 + 24 * 30.973 = 1115.0 us in products. Attention moves 4 * 4096 * 768 bytes: 6.171 us, longer than its
    # 4 * 4096 * 128 * 768 operations in FP16, 5.162 us. A norm moves 6 * 4096 * 768 bytes: 9.257 us, and there are 25.
    assert memory.int8_ms == pytest.approx((1115.04 + 12 * 6.171 + 25 * 9.257) / 1000, rel=1e-4)
    assert memory.sparse_ms == pytest.approx((1115.04 / 2 + 12 * 6.171 + 25 * 9.257) / 1000, rel=1e-4)
    assert memory.fp16_ms == pytest.approx((2 * 1115.04 + 12 * 12.342 + 25 * 9.257) / 1000, rel=1e-4)
    assert memory.product_share == pytest.approx(1115.04 / 1420.5, rel=1e-4)
    # All tensors fit into 40 MB, the weights (53 MB at 2:4) in part: arithmetic alone is left.
    assert cache.int8_ms == pytest.approx((1115.04 + 12 * 5.162) / 1000, rel=1e-4)
    assert cache.sparse_ms == pytest.approx((1115.04 / 2 + 12 * 5.162) / 1000, rel=1e-4)
    assert gain_bound(work, A100).speedup == 2.0


def test_few_tokens_wait_for_weights() -> None:
    """One text of 128 tokens on an A10 (250 TOPS, 600 GB/s, 6 MB): its weights are 84.9 MB, 53.1 MB at 2:4."""
    bound = gain_bound(bert_base(1, 128), figures_of("A10"))
    # 768 x 768: arithmetic takes 0.604 us, and 0.302 at 2:4; reading 6/53.1 less than all weights 0.872 and 0.545.
    assert bound.speedup == pytest.approx(1.6, rel=1e-6)
    # 2:4 reads 5/8 byte a weight and computes two operations a token: 5/8 / 600e9 = 2 * tokens / 500e12.
    assert bound.arithmetic_from_tokens == 261  # 260.4
    assert bound.dense_arithmetic_from_tokens == 209  # 1 / 600e9 = 2 * tokens / 250e12: 208.3
    assert first_shape(261, 128) == "3x128"
    assert gain_bound(bert_base(3, 128), figures_of("A10")).speedup == 2.0


def test_every_block_counts_and_shared_weights_are_held_once() -> None:
    albert = BERT_BASE | {"model_type": "albert", "num_hidden_groups": 1, "inner_group_num": 1}
    work = encoder_workload(FAMILIES["albert"], albert, 8, 128)
    assert {(product.runs, product.matrices) for product in work.products} == {(12, 1)}
    assert work.weights * 12 == bert_base(8, 128).weights == 12 * (4 * 768 * 768 + 2 * 768 * 3072)


def config_of(family: Family) -> dict[str, object]:
    """Sizes of a small model of any family."""
    keys = (family.layers_key, family.hidden_key, family.intermediate_key, family.heads_key)
    sizes = dict(zip(keys, (6, 64, 96, 4), strict=True))
    return {**sizes, "max_position_embeddings": 512, "num_hidden_groups": 2, "inner_group_num": 1}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_weights_of_every_family_are_those_of_its_plan(name: str) -> None:
    family = FAMILIES[name]
    config = config_of(family)
    work = encoder_workload(family, config, 2, 16)
    assert work.weights == sum(out * in_ for out, in_ in family.weights(config).values())
    assert {product.runs for product in work.products} == {6}
    assert work.steps is not None
    assert ("gate" in {step.name for step in work.steps}) == (name in ("modernbert", "nomic_bert", "gte"))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plan_of_a_graph_says_as_much_as_the_config(name: str) -> None:
    """Every weight is read by as many products as its block runs; a fused matrix by three, for its parts."""
    family = FAMILIES[name]
    config = config_of(family)
    shapes, runs = family.weights(config), Counter(family.runs(config))
    uses = {weight: runs[family.block_of(weight)] * (3 if "Wqkv" in weight else 1) for weight in shapes}
    expected = encoder_workload(family, config | {"local_attention": name == "modernbert"}, 2, 16)
    assert planned_workload(family, shapes, uses, 2, 16) == expected
    first = next(iter(shapes))
    assert planned_workload(family, shapes, {**uses, first: 0}, 2, 16) is None
    assert planned_workload(family, {**shapes, first: (1, 1)}, uses, 2, 16) is None
    assert planned_workload(family, {first: shapes[first]}, uses, 2, 16) is None
    assert planned_workload(family, {}, uses, 2, 16) is None


def test_a_sequence_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(EngineError, match="at most 512 tokens, 513 were asked; give a shorter"):
        bert_base(1, 513)
    with pytest.raises(EngineError, match="at most 512 tokens"):
        encoder_workload(FAMILIES["roberta"], BERT_BASE | {"max_position_embeddings": 514, "pad_token_id": 1}, 1, 513)


SIZES = st.integers(1, 2000)
PRODUCTS = st.lists(st.builds(WeightProduct, st.just("w"), SIZES, SIZES, st.just(2), st.integers(1, 2)), min_size=1)
STEPS = st.lists(st.builds(Step, st.just("s"), SIZES, st.integers(0, 10**9), st.integers(0, 10**8), SIZES))


@given(PRODUCTS, STEPS, st.sampled_from(all_figures()), st.integers(1, 5000), st.integers(1, 5000))
def test_bounds_hold_and_more_tokens_never_take_less_time(
    products: list[WeightProduct], steps: list[Step], gpu: GpuFigures, one: int, other: int
) -> None:
    few, many = (Workload(tokens, 1, tuple(products), tuple(steps)) for tokens in sorted((one, other)))
    for work in (few, many):
        bound, estimate = gain_bound(work, gpu).speedup, gain_estimate(work, gpu)
        for found in (estimate.memory, estimate.cache):
            assert found.speedup * (1 + 1e-9) >= 1.0
            assert found.speedup <= bound * (1 + 1e-9)
        assert bound <= 2 * (1 + 1e-9)
        assert estimate.cache.sparse_ms <= estimate.memory.sparse_ms * (1 + 1e-9)
    assert gain_bound(few, gpu).speedup <= gain_bound(many, gpu).speedup * (1 + 1e-9)
    before, after = gain_estimate(few, gpu), gain_estimate(many, gpu)
    for earlier, later in ((before.memory, after.memory), (before.cache, after.cache)):
        assert earlier.fp16_ms <= later.fp16_ms * (1 + 1e-9)
        assert earlier.int8_ms <= later.int8_ms * (1 + 1e-9)
        assert earlier.sparse_ms <= later.sparse_ms * (1 + 1e-9)


def test_a_product_whose_k_is_no_multiple_of_four_gains_nothing() -> None:
    work = Workload(32, 128, (WeightProduct("w", 766, 768, 1, 1),), ())
    assert gain_bound(work, A100).speedup == 1.0
    assert gain_estimate(work, A100).memory.speedup == 1.0


@pytest.mark.parametrize("gpu", ["T4", "V100", "RTX 2080", "7.5", "Tesla T4"])
def test_2_4_cannot_pay_without_sparse_tensor_cores(gpu: str) -> None:
    found = report(gpu)
    assert found.gain is None
    assert found.verdict.startswith(f"2:4 cannot pay here: TensorRT 11.4 has no sparse INT8 kernel for {gpu}")
    assert found.to_dict()["can_pay"] is False


def test_2_4_cannot_pay_on_a_cpu_and_where_tensorrt_rtx_does_not_run() -> None:
    assert report("cpu").verdict == (
        "2:4 cannot pay here: ONNX Runtime and OpenVINO multiply the zeros, too; INT8 is what pays on a CPU"
    )
    assert "TensorRT-RTX runs on compute capability" in report("A100", "trt_rtx").verdict


def test_the_verdict_says_whether_a_kernel_is_known() -> None:
    known, unknown = report("L4", version="8.6"), report("L4", version="11.4")
    assert known.verdict.endswith("(estimate)")
    assert unknown.verdict.endswith("; whether TensorRT 11.4 has a sparse kernel for it is unknown")
    assert known.verdict.startswith("2:4 can gain at most 2.00x over dense INT8 here (bound), and 1.")
    assert report("H100", version="8.6").verdict.endswith(
        "; a sparse kernel is known for conv1x1 alone (`nxm export --lowering`)"
    )
    assert {(kernel.output, kernel.exists) for kernel in known.kernels} == {("int8", True), ("float16", False)}


@pytest.mark.parametrize("gpu", ["8.9", "L20", "H100 NVL", "RTX 4090 Laptop GPU", "RTX 5090", "A100, L4"])
def test_a_gpu_whose_peaks_are_not_known_is_refused_with_those_that_are(gpu: str) -> None:
    with pytest.raises(EngineError, match=r"no peaks of GPU .* are known here; name one of T4, A10, .*H200 SXM"):
        report(gpu)


def test_names_of_gpus_are_told_apart() -> None:
    names = {
        "nvidia l4": "L4",
        "NVIDIA A100-SXM4-40GB": "A100 40 GB",
        "NVIDIA A100-SXM4-80GB": "A100 SXM 80 GB",
        "NVIDIA A100 80GB PCIe": "A100 PCIe 80 GB",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA H100 80GB HBM3": "H100 SXM",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
    }
    assert {text: figures_of(text).name for text in names} == names


def test_figures_are_those_of_dense_products() -> None:
    """INT8 has twice the peak of FP16 (four digits of data sheets), and every name is of the GPU that it says."""
    for figures in all_figures():
        assert figures.int8_tops == pytest.approx(2 * figures.fp16_tflops, rel=0.015)
        assert {compute_capability_of(name) for name in (figures.name, *figures.also)} == {figures.compute_capability}
        assert figures.source
        assert figures.checked
    names = [name.casefold() for figures in all_figures() for name in {figures.name, *figures.also}]
    assert len(set(names)) == len(names)
