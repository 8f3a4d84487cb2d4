"""Batches against a model's inputs: what fits, what is made to fit, what is refused; and how they are counted."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import parser
from qpipe.calibrate.errors import DataError, UnsupportedError
from qpipe.pipeline import graph
from qpipe.pipeline.data import Feed, FeedOptions, Fingerprint, InputInfo, conform, inputs_of, samples_in, take


def info(name: str, dtype: Any, *shape: int | str | None) -> InputInfo:
    return InputInfo(name=name, dtype=np.dtype(dtype), shape=shape)


IDS = info("input_ids", np.int64, "batch", "seq")
MASK = info("attention_mask", np.int64, "batch", "seq")
IMAGE = info("image", np.float32, None, 3, 8, 8)


def test_an_input_that_is_no_tensor_is_refused() -> None:
    model = graph.from_proto(
        parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        g (seq(float[N,3]) s) => (float[N,3] y) { y = ConcatFromSequence <axis = 0> (s) }""")
    )
    with pytest.raises(UnsupportedError, match="input 's' is no tensor"):
        inputs_of(model.graph)


def image(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def test_inputs_are_read_off_a_graph() -> None:
    model = graph.from_proto(
        parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
        g (float[N,3] x, bfloat16[2] b, string[?] s) => (float[N,3] y) { y = Relu(x) }""")
    )
    assert inputs_of(model.graph) == [
        info("x", np.float32, "N", 3),
        info("b", ml_dtypes.bfloat16, 2),
        info("s", object, None),
    ]
    assert [str(entry) for entry in inputs_of(model.graph)] == ["x float32[N,3]", "b bfloat16[2]", "s object[?]"]


def test_a_batch_that_fits_passes_as_it_is() -> None:
    array = image(5, 3, 8, 8)
    assert conform({"image": array}, [IMAGE])["image"] is array


REFUSED = {
    "missing": ({"input_ids": np.ones((1, 4), int)}, [IDS, MASK], "no array for input 'attention_mask'", "add attent"),
    "renamed": ({"ids": np.ones((1, 4), int)}, [IDS], "no array for input 'input_ids'", "--map ids=input_ids"),
    "extra": ({"image": image(1, 3, 8, 8), "label": image(1)}, [IMAGE], "is no input.*'label'", "remove label"),
    "kind": ({"image": image(1, 3, 8, 8, dtype=np.uint8)}, [IMAGE], "has type uint8, not float32", "convert 'image'"),
    "float for integer": ({"input_ids": np.ones((1, 4))}, [IDS], "has type float64, not int64", "convert"),
    "rank": ({"image": image(3, 8, 8)}, [IMAGE], "has 3 axes, not 4", "--batchify"),
    "rank by two": ({"image": image(8, 8)}, [IMAGE], "has 2 axes, not 4", "reshape"),
    "size": ({"image": image(1, 3, 8, 9)}, [IMAGE], "has size 9 on axis 3, not 8", "resize"),
    "channels last": ({"image": image(1, 8, 8, 3)}, [IMAGE], "has size 8 on axis 1, not 3", "resize"),
    "batch": ({"x": image(2, 3)}, [info("x", np.float32, 1, 3)], "has size 2 on axis 0, not 1", "--batch 1"),
    "text": ({"x": np.array(["a"])}, [info("x", np.float32, 1)], "has type <U1", "convert"),
    "boolean": ({"x": np.array([1])}, [info("x", bool, 1)], "has type int64, not bool", "convert"),
    "overflow": ({"x": np.array([2**40])}, [info("x", np.int32, 1)], "has type int64, not int32", "convert"),
    "sign": ({"x": np.array([-1])}, [info("x", np.uint64, 1)], "has type int64, not uint64", "convert"),
    "infinite": ({"x": np.array([1e10])}, [info("x", np.float16, 1)], "has type float64, not float16", "convert"),
    "objects": ({"x": np.array([None])}, [info("x", np.float32, 1)], "is no array", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_shown_beside_what_would(case: str) -> None:
    batch, inputs, message, remedy = REFUSED[case]
    with pytest.raises(DataError, match=message) as caught:
        conform(batch, inputs)
    assert caught.value.exit_code == 4
    if case == "objects":
        return
    assert remedy in str(caught.value.do)
    assert all(str(entry) in str(caught.value.expected) for entry in inputs)
    assert all(f"{name} {array.dtype}" in str(caught.value.found) for name, array in batch.items())


def test_the_remedies_work() -> None:
    assert set(conform({"ids": np.ones((1, 4), int)}, [IDS], {"ids": "input_ids"})) == {"input_ids"}
    assert conform({"image": image(3, 8, 8)}, [IMAGE], batchify=True)["image"].shape == (1, 3, 8, 8)
    assert conform({"image": image(2, 3, 8, 8)}, [IMAGE], batchify=True)["image"].shape == (2, 3, 8, 8)
    with pytest.raises(DataError, match="has 2 axes"):
        conform({"image": image(8, 8)}, [IMAGE], batchify=True)


@pytest.mark.parametrize(
    ("have", "want"),
    [
        (np.float64, np.float32),
        (np.float16, np.float32),
        (np.float32, np.float16),
        (np.float32, ml_dtypes.bfloat16),
        (np.int32, np.int64),
        (np.int64, np.int32),
        (np.uint8, np.int64),
        (np.int64, np.uint8),
        (np.int64, ml_dtypes.int4),
    ],
)
def test_safe_casts_are_done_and_told(have: Any, want: Any) -> None:
    told: list[str] = []
    array = np.array([0, 1, 7], have)
    cast = conform({"x": array}, [info("x", want, None)], warn=told.append)["x"]
    assert cast.dtype == want
    assert cast.astype(float).tolist() == [0, 1, 7]
    assert told == [f"input 'x': {np.dtype(have)} cast to {np.dtype(want)}"]


def test_infinities_and_nans_of_the_data_survive_a_cast() -> None:
    array = np.array([np.inf, -np.inf, np.nan, 1.0])
    cast = conform({"x": array}, [info("x", np.float32, None)])["x"]
    np.testing.assert_array_equal(cast, array.astype(np.float32))


def test_an_open_rank_takes_everything_and_text_stays_text() -> None:
    anything = InputInfo(name="x", dtype=np.dtype(np.float32), shape=None)
    assert conform({"x": image(1, 2, 3)}, [anything])["x"].shape == (1, 2, 3)
    words = np.array(["a", "ü"])
    assert conform({"x": words}, [info("x", object, None)])["x"].tolist() == ["a", "ü"]


def rows(*sizes: int) -> list[dict[str, np.ndarray]]:
    """Return batches of the given sizes; the samples are numbered through."""
    ends = np.cumsum(sizes)
    return [
        {"x": np.arange(end - size, end, dtype=np.float32).reshape(size, 1)}
        for size, end in zip(sizes, ends, strict=True)
    ]


ROW = [info("x", np.float32, "N", 1)]


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), samples=st.integers(0, 30))
def test_take_gives_exactly_as_many_samples(sizes: list[int], samples: int) -> None:
    taken = [batch["x"].reshape(-1).tolist() for batch in take(rows(*sizes), samples)]
    assert [sample for batch in taken for sample in batch] == list(range(min(samples, sum(sizes))))
    assert all(taken)
    whole = list(take(rows(*sizes), samples, whole=True))
    assert [len(batch["x"]) for batch in whole] == sizes[: len(whole)]
    assert sum(sizes[: len(whole)]) >= min(samples, sum(sizes))


def test_take_does_not_ask_for_more_than_it_gives() -> None:
    source = iter(rows(2, 2, 2))
    assert len(list(take(source, 4))) == 2
    assert len(list(source)) == 1


def test_samples_are_counted_along_the_first_axis() -> None:
    assert samples_in({"x": image(4, 2), "y": image(4)}) == 4
    assert samples_in({"x": image(4, 2), "scale": np.float32(1)}) == 4
    assert samples_in({"x": image(4, 2), "y": image(3)}) == 1
    assert samples_in({"scale": np.asarray(1.0)}) == 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 4))
def test_a_fingerprint_does_not_depend_on_batching(sizes: list[int], pause: int) -> None:
    one, many = Fingerprint(), Fingerprint()
    one.update(rows(sum(sizes))[0])
    for i, batch in enumerate(rows(*sizes)):
        many.update(batch)
        if i == pause:
            many = Fingerprint(many.state())
    assert many.state() == one.state()
    assert one.samples == sum(sizes)


def test_a_fingerprint_tells_data_apart() -> None:
    def mark(*batches: dict[str, np.ndarray]) -> dict[str, Any]:
        fingerprint = Fingerprint()
        for batch in batches:
            fingerprint.update(batch)
        return fingerprint.state()

    a, b = {"x": image(1, 2)}, {"x": 2 * image(1, 2)}
    known = [mark(), mark(a), mark(b), mark(a, b), mark(b, a), mark(a, a), mark({"y": image(1, 2)})]
    known += [mark({"x": image(1, 2, dtype=np.float64)}), mark({"x": image(1, 2, 1)}), mark({"x": np.array(["a"])})]
    assert len({state["running"] for state in known}) == len(known)
    assert mark(a, b)["first"] == mark(a)["last"]
    assert mark(a, b)["last"] == mark(b)["first"]
    assert mark({"x": np.array(["a"], object)})["running"] == mark({"x": np.array(["a"], object)})["running"]


def test_a_feed_cuts_casts_counts_and_tells_once() -> None:
    told: list[str] = []
    data = [{"v": batch["x"].astype(np.float64)} for batch in rows(2, 2, 2)]
    data.insert(1, {"v": np.empty((0, 1))})
    feed = Feed(data, ROW, FeedOptions(samples=5, mapping={"v": "x"}), warn=told.append)
    out = [batch["x"] for batch in feed]
    assert [len(array) for array in out] == [2, 2, 1]
    assert {array.dtype for array in out} == {np.dtype(np.float32)}
    assert (feed.batches, feed.skipped, feed.fingerprint.samples) == (3, 1, 5)
    assert told == ["input 'x': float64 cast to float32", "batches without elements were skipped"]


def test_only_empty_batches_are_no_data() -> None:
    feed = Feed([{"x": np.empty((0, 1), np.float32)}], ROW)
    with pytest.raises(DataError, match="no samples"):
        list(feed)
    assert feed.skipped == 1


def test_a_fixed_batch_size_goes_before_the_asked_one(tmp_path: Any) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(10, dtype=np.float32).reshape(10, 1))
    told: list[str] = []
    feed = Feed(tmp_path / "a.npz", [info("x", np.float32, 4, 1)], FeedOptions(batch=3, samples=6), warn=told.append)
    assert [len(batch["x"]) for batch in feed] == [4, 4]
    feed = Feed(tmp_path / "a.npz", [info("x", np.float32, 4, 1)], FeedOptions(batch=3), warn=told.append)
    assert [len(batch["x"]) for batch in feed] == [4, 4]
    assert told == ["the last 2 samples were left out: the model takes batches of 4 only"]


def test_too_few_samples_for_a_fixed_batch_are_an_error(tmp_path: Any) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 1), np.float32))
    with pytest.raises(DataError, match="has size 3 on axis 0, not 4"):
        list(Feed(tmp_path / "a.npz", [info("x", np.float32, 4, 1)]))


def test_batchify_goes_before_counting() -> None:
    samples = [{"x": np.full(3, i, np.float32)} for i in range(4)]
    feed = Feed(samples, [info("x", np.float32, 1, 3)], FeedOptions(batchify=True, samples=3))
    assert [batch["x"].shape for batch in feed] == [(1, 3)] * 3
    assert feed.fingerprint.samples == 3


def test_the_samples_to_come_are_known_where_files_say_so(tmp_path: Any) -> None:
    inputs = [InputInfo(name="x", dtype=np.dtype(np.float32), shape=("N", 2))]
    np.save(tmp_path / "a.npy", np.zeros((7, 2), np.float32))
    (tmp_path / "folder").mkdir()
    for name, count in (("a", 3), ("b", 4)):
        np.savez(tmp_path / "folder" / f"{name}.npz", x=np.zeros((count, 2), np.float32), scalar=np.float32(1))
    (tmp_path / "d.py").write_text("def load_data(): raise SystemExit")
    (tmp_path / "broken.npz").write_bytes(b"PK")

    def expected(name: str, samples: int | None = None) -> int | None:
        return Feed(tmp_path / name, inputs, FeedOptions(samples=samples)).expected

    assert expected("a.npy") == 7
    assert expected("a.npy", 5) == 5
    assert expected("a.npy", 50) == 7
    assert expected("folder") == 7
    assert expected("d.py") is None
    assert expected("d.py", 9) == 9
    assert expected("broken.npz") is None
    assert Feed([{"x": np.zeros((1, 2), np.float32)}], inputs).expected is None
