"""Requests to arrays and back, and everything that a request may get wrong."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.serving.protocol import TensorSpec, parse_infer, parse_json, render_infer
from nxm_export.errors import RequestRefused

IDS, MASK = TensorSpec("ids", "INT64", (-1, -1)), TensorSpec("mask", "INT64", (-1, -1))
TEXT = TensorSpec("text", "BYTES", (-1, 1))
LOGITS, LABEL = TensorSpec("logits", "FP32", (-1, 2)), TensorSpec("label", "BYTES", (-1, 1))
arrays = st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: st.lists(
        st.integers(-(2**63), 2**63 - 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
    ).map(lambda values: np.array(values, np.int64).reshape(shape))
)


def entry(name: str, array: np.ndarray, **more: object) -> dict[str, object]:
    return {"name": name, "datatype": "INT64", "shape": list(array.shape), **more}


def message(request: object, *blobs: bytes) -> tuple[bytes, str | None]:
    head = json.dumps(request).encode()
    return head + b"".join(blobs), str(len(head)) if blobs else None


@given(arrays, arrays)
def test_binary_and_json_tensors_arrive_as_they_were_sent(ids: np.ndarray, mask: np.ndarray) -> None:
    binary = [
        entry("ids", ids, parameters={"binary_data_size": ids.nbytes}),
        entry("mask", mask, parameters={"binary_data_size": mask.nbytes}),
    ]
    flat = [entry("ids", ids, data=ids.ravel().tolist()), entry("mask", mask, data=mask.tolist())]
    mixed = [binary[0], flat[1]]
    for inputs, blobs in ((binary, (ids.tobytes(), mask.tobytes())), (flat, ()), (mixed, (ids.tobytes(),))):
        request = parse_infer(*message({"inputs": inputs}, *blobs), [IDS, MASK], [LOGITS])
        np.testing.assert_array_equal(request.tensors["ids"], ids)
        np.testing.assert_array_equal(request.tensors["mask"], mask)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=5))
def test_texts_arrive_as_they_were_sent_in_both_forms(texts: list[str]) -> None:
    encoded = [text.encode() for text in texts]
    blob = b"".join(len(item).to_bytes(4, "little") + item for item in encoded)
    meta = {"name": "text", "datatype": "BYTES", "shape": [len(texts), 1]}
    for request, blobs in (
        ({**meta, "data": texts}, ()),
        ({**meta, "parameters": {"binary_data_size": len(blob)}}, (blob,)),
    ):
        body, length = message({"inputs": [request]}, *blobs)
        parsed = parse_infer(body, length or str(len(body)), [TEXT], [LOGITS])
        assert [item for row in parsed.tensors["text"] for item in row] == encoded


@given(arrays)
def test_an_answer_reads_back_bit_for_bit_in_both_forms(array: np.ndarray) -> None:
    logits = array.astype(np.float32)
    body = json.dumps({"id": "7", "inputs": [entry("ids", array, data=array.tolist())]}).encode()
    for parameters in ({}, {"binary_data_output": True}):
        request = json.loads(body) | {"parameters": parameters}
        asked = parse_infer(json.dumps(request).encode(), None, [IDS], [LOGITS])
        headers, content = render_infer("m", "1", asked, {"logits": ("FP32", logits)})
        length = dict(headers).get(b"inference-header-content-length")
        answer = json.loads(content[: int(length)] if length else content)
        assert (answer["model_name"], answer["model_version"], answer["id"]) == ("m", "1", "7")
        (output,) = answer["outputs"]
        assert output["shape"] == list(logits.shape)
        assert (output["datatype"], "data" in output) == ("FP32", not parameters)
        actual = np.frombuffer(content[int(length) :], "<f4") if length else np.array(output["data"], np.float32)
        np.testing.assert_array_equal(actual.reshape(logits.shape), logits)


def test_labels_are_strings_in_json_and_length_prefixed_bytes_in_binary() -> None:
    labels = np.array([["gut"], ["schön"]], object)
    inputs = [{"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": ["a", "b"]}]
    asked = parse_infer(message({"inputs": inputs})[0], None, [TEXT], [LABEL])
    assert json.loads(render_infer("m", "1", asked, {"label": ("BYTES", labels)})[1])["outputs"][0]["data"] == [
        "gut",
        "schön",
    ]
    outputs = [{"name": "label", "parameters": {"binary_data": True}}]
    asked = parse_infer(message({"inputs": inputs, "outputs": outputs})[0], None, [TEXT], [LABEL])
    _, content = render_infer("m", "1", asked, {"label": ("BYTES", labels)})
    assert content.endswith(b"\x03\0\0\0gut\x06\0\0\0sch\xc3\xb6n")


ONE = {"name": "ids", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}
BINARY = {"name": "ids", "datatype": "INT64", "shape": [1, 2], "parameters": {"binary_data_size": 16}}
WORDS = {"name": "text", "datatype": "BYTES", "shape": [1, 1]}


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ([], "must be a JSON object"),
        ({}, "'inputs' must be a list"),
        ({"inputs": []}, "missing input ids"),
        ({"inputs": [3]}, "every input must be a JSON object"),
        ({"inputs": [{**ONE, "name": 3}]}, "'name' must be a string"),
        ({"inputs": [{**ONE, "name": "mask"}]}, "unexpected input 'mask'; the model takes ids"),
        ({"inputs": [ONE, ONE]}, "given twice"),
        ({"inputs": [{**ONE, "datatype": "FP32"}]}, "datatype 'FP32'; the model takes INT64"),
        ({"inputs": [{**ONE, "datatype": None}]}, "datatype None"),
        ({"inputs": [{**ONE, "shape": [2]}]}, r"shape \[2\]; the model takes \[-1, -1\]"),
        ({"inputs": [{**ONE, "shape": "1x2"}]}, "shape 1x2"),
        ({"inputs": [{**ONE, "shape": [1, -2]}]}, "any whole number from 1"),
        ({"inputs": [{**ONE, "shape": [1, 0]}]}, "any whole number from 1"),
        ({"inputs": [{**ONE, "shape": [True, 2]}]}, "any whole number from 1"),
        ({"inputs": [{**ONE, "shape": [1.0, 2]}]}, "any whole number from 1"),
        ({"inputs": [{**ONE, "shape": [2**31, 2**31]}]}, "any whole number from 1"),
        ({"inputs": [{**ONE, "shape": [2**30, 2**30]}]}, "has 2 elements"),
        ({"inputs": [{**ONE, "data": "12"}]}, "must be a list"),
        ({"inputs": [{**ONE, "data": [1]}]}, "has 1 elements"),
        ({"inputs": [{**ONE, "data": [[1], [2]]}]}, "not nested as its shape"),
        ({"inputs": [{**ONE, "data": [[1], 2]}]}, "not nested as its shape"),
        ({"inputs": [{**ONE, "shape": [2, 2], "data": [[1, 2], [3]]}]}, "not nested as its shape"),
        ({"inputs": [{**ONE, "data": [1, [2]]}]}, "is not INT64"),
        ({"inputs": [{**ONE, "data": [1, 2.0]}]}, "is not INT64"),
        ({"inputs": [{**ONE, "data": [1, "2"]}]}, "is not INT64"),
        ({"inputs": [{**ONE, "data": [1, True]}]}, "is not INT64"),
        ({"inputs": [{**ONE, "data": [1, None]}]}, "is not INT64"),
        ({"inputs": [{**ONE, "data": [1, 2**63]}]}, "too large for an integer"),
        ({"inputs": [{k: v for k, v in ONE.items() if k != "data"}]}, "has no data"),
        ({"inputs": [{**ONE, "parameters": {"binary_data_size": 16}}]}, "send one of them"),
        ({"inputs": [{**ONE, "parameters": {"shared_memory_region": "x"}}]}, "shared memory is not offered"),
        ({"inputs": [{**ONE, "parameters": []}]}, "'parameters' must be an object"),
        ({"inputs": [BINARY]}, "not within the body's bytes"),
        ({"inputs": [ONE], "id": 7}, "'id' must be a string"),
        ({"inputs": [ONE], "outputs": ["logits"]}, "every requested output"),
        ({"inputs": [ONE], "outputs": [{"name": "x"}]}, "unexpected output 'x'; the model gives logits"),
        ({"inputs": [ONE], "outputs": [{"name": "logits"}] * 2}, "asked for twice"),
        ({"inputs": [ONE], "outputs": [{"name": "logits", "parameters": {"binary_data": 1}}]}, "true or false"),
        ({"inputs": [ONE], "outputs": [{"name": "logits", "parameters": {"classification": -1}}]}, "number of classes"),
        ({"inputs": [ONE], "outputs": [{"name": "logits", "parameters": {"classification": True}}]}, "number of"),
        ({"inputs": [ONE], "parameters": {"timeout": 1.5}}, "microseconds"),
        ({"inputs": [ONE], "parameters": {"timeout": -1}}, "microseconds"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused_with_the_reason(request_: object, complaint: str) -> None:
    with pytest.raises(RequestRefused, match=complaint) as refused:
        parse_infer(json.dumps(request_).encode(), None, [IDS], [LOGITS])
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("body", "length", "complaint"),
    [
        (b'{"inputs": [', None, "not valid JSON"),
        (b"\xff\xfe{}", None, "not UTF-8"),
        (b"", None, "not valid JSON"),
        (b'{"a": 1, "a": 2}', None, "key 'a' stands there twice"),
        (b'{"a": NaN}', None, "NaN is not a JSON number"),
        (b'{"a": -Infinity}', None, "-Infinity is not a JSON number"),
        (b"[" * 100_000, None, "recursion"),
        (b'{"a": ' + b"9" * 10_000 + b"}", None, "not valid JSON"),
        (b"{}", "3", "has only 2 bytes"),
        (b"{}", "-1", "must be a whole number"),
        (b"{}", "1e3", "must be a whole number"),
        (b"{}", "\u0663", "must be a whole number"),
        (b"{}", "9" * 5000, "must be a whole number"),
        (b"{}x", None, "not valid JSON"),
        (b'{"a": 1e400}', None, "too large for a number"),
        (b'{"a": -1' + b"0" * 400 + b".0}", None, "too large for a number"),
        (b"[" * 70 + b"]" * 70, None, "nested more than 64 deep"),
        (b"\xef\xbb\xbf{}", None, "not valid JSON"),
    ],
)
def test_a_body_that_is_not_strict_json_is_refused(body: bytes, length: str | None, complaint: str) -> None:
    with pytest.raises(RequestRefused, match=complaint):
        parse_infer(body, length, [IDS], [LOGITS])


@pytest.mark.parametrize(
    ("size", "blob", "complaint"),
    [
        (16, bytes(24), "8 bytes follow the last binary tensor"),
        (24, bytes(24), "takes 16 bytes, binary_data_size is 24"),
        (15, bytes(16), "takes 16 bytes, binary_data_size is 15"),
        (17, bytes(16), "not within the body's bytes"),
        (-1, bytes(16), "not within the body's bytes"),
        (True, bytes(16), "not within the body's bytes"),
        ("16", bytes(16), "not within the body's bytes"),
    ],
)
def test_binary_sizes_must_fit_shape_and_body(size: object, blob: bytes, complaint: str) -> None:
    with pytest.raises(RequestRefused, match=complaint):
        parse_infer(*message({"inputs": [{**BINARY, "parameters": {"binary_data_size": size}}]}, blob), [IDS], [LOGITS])


@pytest.mark.parametrize(
    ("shape", "blob", "complaint"),
    [
        ([1, 1], b"\x05\0\0\0abcd", "end within an element"),
        ([1, 1], b"\xff\xff\xff\xffabcd", "end within an element"),
        ([1, 1], b"\x01\0\0\0a!", "1 bytes follow the last element"),
        ([2, 1], b"\x01\0\0\0a\0\0", "cannot hold them"),
        ([2, 1], b"\x01\0\0\0aaaa", "end within an element"),
        ([2**31 - 1, 1], bytes(64), "cannot hold them"),
    ],
)
def test_texts_in_binary_must_fill_their_bytes(shape: list[int], blob: bytes, complaint: str) -> None:
    request = {"inputs": [{**WORDS, "shape": shape, "parameters": {"binary_data_size": len(blob)}}]}
    with pytest.raises(RequestRefused, match=complaint):
        parse_infer(*message(request, blob), [TEXT], [LOGITS])


def test_half_a_surrogate_pair_in_a_text_is_refused() -> None:
    body = json.dumps({"inputs": [WORDS]}).replace("}]}", ', "data": ["\\ud800"]}]}').encode()
    with pytest.raises(RequestRefused, match="half a surrogate pair"):
        parse_infer(body, None, [TEXT], [LOGITS])


@given(st.binary(max_size=200), st.none() | st.integers(-5, 250).map(str))
def test_no_bytes_whatever_do_more_than_being_refused(body: bytes, length: str | None) -> None:
    with pytest.raises(RequestRefused):
        parse_infer(body, length, [IDS], [LOGITS])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.sampled_from(["id", "inputs", "outputs", "parameters"]),
    st.sampled_from(["", "name", "datatype", "shape", "data", "parameters"]),
    json_values,
)
def test_any_json_in_any_place_is_refused_or_parsed(key: str, inner: str, value: object) -> None:
    request: dict[str, object] = {"inputs": [dict(ONE)], key: value}
    if inner and key == "inputs":
        request["inputs"] = [{**ONE, inner: value}]
    try:
        parsed = parse_infer(json.dumps(request).encode(), None, [IDS], [LOGITS])
    except RequestRefused:
        return
    assert parsed.tensors["ids"].tolist() == [[1, 2]] or inner == "data"


def test_an_optional_input_may_be_left_out_and_nothing_else() -> None:
    optional = TensorSpec("mask", "INT64", (-1, -1), optional=True)
    body = json.dumps({"inputs": [ONE]}).encode()
    assert list(parse_infer(body, None, [IDS, optional], [LOGITS]).tensors) == ["ids"]
    with pytest.raises(RequestRefused, match="missing input mask"):
        parse_infer(body, None, [IDS, MASK], [LOGITS])


def test_a_timeout_is_in_microseconds_and_zero_is_none() -> None:
    for sent, seconds in ((2_500_000, 2.5), (0, None)):
        body = json.dumps({"inputs": [ONE], "parameters": {"timeout": sent}}).encode()
        assert parse_infer(body, None, [IDS], [LOGITS]).timeout == seconds


def test_parse_json_takes_what_it_should() -> None:
    assert parse_json(b'{"ready": true}') == {"ready": True}


def test_a_key_twice_is_found_fast_and_shown_short() -> None:
    """Half a million keys, the last of them twice: no search of every key for every key."""
    keys = ",".join(f'"{i}": 0' for i in range(300_000))
    began = time.process_time()
    with pytest.raises(RequestRefused, match="stands there twice") as refused:
        parse_json(("{" + keys + ', "' + "x" * 10_000 + '": 0, "' + "x" * 10_000 + '": 0}').encode())
    assert time.process_time() - began < 5
    assert len(str(refused.value)) < 300


def test_null_counts_as_left_out_everywhere() -> None:
    """What KServe's client sends for members that nobody has set."""
    null = {"parameters": None}
    request = {
        "id": None,
        "inputs": [{**ONE, **null}],
        "outputs": [{"name": "logits", **null}, {"name": "label", "parameters": {"binary_data": None}}],
        **null,
    }
    asked = parse_infer(json.dumps(request).encode(), None, [IDS], [LOGITS, LABEL])
    assert (asked.id, asked.timeout) == (None, None)
    assert asked.tensors["ids"].tolist() == [[1, 2]]
    assert not any(output.binary for output in asked.outputs)
    nothing = {"inputs": [{**ONE, "parameters": {"binary_data_size": None, "shared_memory_region": None}}]}
    nothing["outputs"] = None  # type: ignore[assignment]
    asked = parse_infer(json.dumps(nothing).encode(), None, [IDS], [LOGITS, LABEL])
    assert [output.name for output in asked.outputs] == ["label", "logits"]
    with pytest.raises(RequestRefused, match="'inputs' must be a list"):
        parse_infer(b'{"inputs": null}', None, [IDS], [LOGITS])


def test_texts_may_be_a_list_of_them() -> None:
    texts = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}
    parsed = parse_infer(json.dumps({"inputs": [texts]}).encode(), None, [TEXT], [LOGITS])
    assert parsed.tensors["text"].tolist() == [[b"a"], [b"b"]]
    with pytest.raises(RequestRefused, match=r"shape \[2\]"):  # tokens may not: which of both is it?
        parse_infer(json.dumps({"inputs": [{**ONE, "shape": [2]}]}).encode(), None, [IDS], [LOGITS])


@given(st.permutations(["logits", "label"]), st.integers(1, 2))
def test_outputs_come_in_one_order_whatever_the_request_says(names: list[str], count: int) -> None:
    request = {"inputs": [ONE], "outputs": [{"name": name} for name in names[:count]]}
    asked = parse_infer(json.dumps(request).encode(), None, [IDS], [LOGITS, LABEL])
    assert [output.name for output in asked.outputs] == sorted(names[:count])  # words first, as on Triton


def test_classification_gives_the_largest_values_in_tritons_form() -> None:
    """The strings are what Triton 2.51 answered for these logits."""
    logits = np.array([[-18.0, -10.0], [-9.0, -10.0]], np.float32)
    for classes, binary in ((1, False), (2, False), (9, True)):
        parameters = {"classification": classes, "binary_data": binary}
        request = {"inputs": [ONE], "outputs": [{"name": "logits", "parameters": parameters}]}
        asked = parse_infer(json.dumps(request).encode(), None, [IDS], [LOGITS])
        headers, content = render_infer("m", "1", asked, {"logits": ("FP32", logits)})
        length = int(dict(headers).get(b"inference-header-content-length", len(content)))
        (output,) = json.loads(content[:length])["outputs"]
        expected = [["-10.000000:1", "-18.000000:0"], ["-9.000000:0", "-10.000000:1"]]
        flat = [text for row in expected for text in row[:classes]]
        assert (output["datatype"], output["shape"]) == ("BYTES", [2, min(2, classes)])
        if binary:
            assert content[length:] == b"".join(len(text).to_bytes(4, "little") + text.encode() for text in flat)
        else:
            assert output["data"] == flat
    words = {"inputs": [ONE], "outputs": [{"name": "label", "parameters": {"classification": 1}}]}
    with pytest.raises(RequestRefused, match="holds words"):
        parse_infer(json.dumps(words).encode(), None, [IDS], [LABEL])


def test_a_shape_that_is_too_large_is_refused_before_its_data_is_looked_at() -> None:
    def at_most_two(shape: tuple[int, ...]) -> None:
        if shape[0] > 2:
            raise RequestRefused(400, "too many rows")

    for data in ([["not", "even"], "tokens"], None, 7):
        body = json.dumps({"inputs": [{**ONE, "shape": [3, 2], "data": data}]}).encode()
        with pytest.raises(RequestRefused, match="too many rows"):
            parse_infer(body, None, [IDS], [LOGITS], at_most_two)
