"""The .qcal file: the same bytes for the same content, readable by others, refused when damaged or foreign."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qpipe.calibrate.errors import DataError, UsageError, WriteError
from qpipe.calibrate.stats.channel_amax import ChannelAmax
from qpipe.calibrate.stats.gram import Gram
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.pipeline.calibration import Calibration, ModelIdentity, TensorStats, load, merge, save
from qpipe.pipeline.graph import Topology

NODES = tuple((f"node{i}", "Relu") for i in range(8))
MODEL = ModelIdentity(hash="ab" * 32, topology=Topology("cd" * 32, NODES))
VALUES = hnp.arrays(np.float32, st.tuples(st.integers(0, 8), st.just(3)), elements=st.floats(width=32))


def stats_of(x: np.ndarray, details: bool = True) -> TensorStats:
    tokens = np.where(np.abs(x) < 1e6, x, np.float32(0))
    return TensorStats(
        histogram=Histogram.of(x),
        channels=ChannelAmax.of(tokens) if details else None,
        gram=Gram.of(tokens) if details else None,
    )


def calibration_of(x: np.ndarray, names: tuple[str, ...] = ("a", "layer/b c", "ü:ids"), **fields) -> Calibration:
    return Calibration(
        tensors={name: stats_of(x, details=index == 0) for index, name in enumerate(names)},
        samples=len(x),
        model=MODEL,
        data=({"samples": len(x), "first": "11", "last": "22", "running": "33"},),
        options={"sentinel": 1e30, "device": "cpu"},
        versions={"onnxruntime": "1.0", "qpipe": "0.1"},
        not_covered={"z": "it is a constant"},
        **fields,
    )


def same(one: Calibration, other: Calibration) -> bool:
    """Whether two records agree bit for bit."""
    for name in one.tensors:
        a, b = one.tensors[name], other.tensors[name]
        if a.histogram != b.histogram or (a.gram is None) != (b.gram is None):
            return False
        if a.gram is not None and not np.array_equal(a.gram.matrix, b.gram.matrix):
            return False
    rest = {"tensors": {}}
    return list(one.tensors) == list(other.tensors) and dataclasses.replace(one, **rest) == dataclasses.replace(
        other, **rest
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES)
def test_what_is_saved_is_loaded(tmp_path, x):
    calibration = calibration_of(x)
    save(calibration, tmp_path / "a.qcal", force=True)
    again = load(tmp_path / "a.qcal")
    assert same(calibration, again)
    save(again, tmp_path / "b.qcal", force=True)
    assert (tmp_path / "a.qcal").read_bytes() == (tmp_path / "b.qcal").read_bytes()


def test_any_safetensors_reader_opens_it(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    calibration = calibration_of(np.random.default_rng(0).standard_normal((9, 3)).astype(np.float32))
    save(calibration, tmp_path / "a.qcal")
    with safetensors.safe_open(tmp_path / "a.qcal", "np") as file:
        for name, stats in calibration.tensors.items():
            assert np.array_equal(file.get_tensor(f"{name}:ids"), stats.histogram.ids)
            assert np.array_equal(file.get_tensor(f"{name}:counts"), stats.histogram.counts)
        assert np.array_equal(file.get_tensor("a:gram"), calibration.tensors["a"].gram.matrix)
        content = json.loads(file.metadata()["qcal"])
    assert content["samples"] == 9
    assert content["model"]["hash"] == MODEL.hash


def test_nothing_at_all_can_be_saved(tmp_path):
    save(Calibration(tensors={}), tmp_path / "a.qcal")
    assert load(tmp_path / "a.qcal") == Calibration(tensors={})


def test_an_existing_file_needs_force(tmp_path):
    save(Calibration(tensors={}), tmp_path / "a.qcal")
    with pytest.raises(WriteError, match="exists"):
        save(Calibration(tensors={}), tmp_path / "a.qcal")


def test_a_missing_file_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no such calibration file"):
        load(tmp_path / "none.qcal")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("qcal") / "a.qcal"
    save(calibration_of(np.random.default_rng(1).standard_normal((20, 3)).astype(np.float32)), path)
    return path.read_bytes()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_is_noticed(whole, tmp_path, data):
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[place] ^ (1 << data.draw(st.integers(0, 7)))
    (tmp_path / "x.qcal").write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
    with pytest.raises(DataError) as caught:
        load(tmp_path / "x.qcal")
    assert caught.value.exit_code == 4
    assert caught.value.found


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_truncation_and_any_bytes_are_refused(whole, tmp_path, data):
    choice = data.draw(st.integers(0, 2))
    if choice == 0:
        content = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif choice == 1:
        content = data.draw(st.binary(max_size=200))
    else:
        content = whole + data.draw(st.binary(min_size=1, max_size=9))
    (tmp_path / "x.qcal").write_bytes(content)
    with pytest.raises(DataError):
        load(tmp_path / "x.qcal")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["__metadata__", "qcal", "schema", "data_offsets", "dtype", "a"]), inner)
        ),
        max_leaves=8,
    )
)
def test_any_json_header_is_refused(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x.qcal").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(DataError):
        load(tmp_path / "x.qcal")


def test_a_newer_schema_says_so(whole, tmp_path):
    newer = whole.replace(b'"schema": "1"', b'"schema": "9"')
    assert newer != whole
    (tmp_path / "x.qcal").write_bytes(newer)
    with pytest.raises(DataError, match="newer") as caught:
        load(tmp_path / "x.qcal")
    assert "upgrade" in caught.value.do


def test_an_older_schema_than_the_first_is_refused(whole, tmp_path):
    (tmp_path / "x.qcal").write_bytes(whole.replace(b'"schema": "1"', b'"schema": "0"'))
    with pytest.raises(DataError, match="there is no schema 0"):
        load(tmp_path / "x.qcal")


def test_another_safetensors_file_says_so(tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy")
    numpy_io.save_file({"w": np.ones(3, np.float32)}, tmp_path / "x.qcal", metadata={"format": "np"})
    with pytest.raises(DataError, match="holds no calibration"):
        load(tmp_path / "x.qcal")


def test_statistics_of_another_model_are_refused_with_the_differences():
    nodes = (*NODES[:2], ("other", "Sigmoid"), *NODES[3:])
    calibration = calibration_of(np.ones((1, 3), np.float32))
    calibration.check_model(MODEL)
    with pytest.raises(DataError) as caught:
        calibration.check_model(ModelIdentity(hash="ee" * 32, topology=Topology("ff" * 32, nodes)))
    assert "node2" in caught.value.found
    assert "other (Sigmoid)" in caught.value.found
    with pytest.raises(DataError, match="weights differ"):
        calibration.check_model(ModelIdentity(hash="ee" * 32, topology=MODEL.topology))


def test_at_most_five_differences_are_shown():
    other = Topology("ff" * 32, tuple((f"x{i}", "Add") for i in range(40)))
    with pytest.raises(DataError) as caught:
        MODEL.check(ModelIdentity(hash="ee" * 32, topology=other), where="here")
    assert caught.value.found.count("only in") == 5
    assert "and 43 more" in caught.value.found


@given(VALUES, VALUES, VALUES)
def test_merge_is_exact_commutative_and_associative(x, y, z):
    a, b, c = (calibration_of(v, names=("t",)) for v in (x, y, z))
    histograms = lambda calibration: calibration.tensors["t"].histogram  # noqa: E731
    whole = calibration_of(np.concatenate([x, y, z]), names=("t",))
    assert histograms(merge(merge(a, b), c)) == histograms(whole)
    assert same(merge(a, b), merge(b, a))
    assert merge(merge(a, b), c).data == merge(a, merge(b, c)).data
    assert merge(merge(a, b), c).samples == len(x) + len(y) + len(z)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ModelIdentity(hash="00", topology=MODEL.topology)}, "another model"),
        ({"options": {"sentinel": 5.0}}, "other options"),
        ({"not_covered": {}}, "other tensors not covered"),
        ({"tensors": {}}, "other tensors"),
    ],
)
def test_what_does_not_fit_is_not_merged(change, message):
    calibration = calibration_of(np.ones((1, 3), np.float32))
    with pytest.raises(DataError, match=message):
        merge(calibration, dataclasses.replace(calibration, **change))


def test_versions_are_joined():
    calibration = calibration_of(np.ones((1, 3), np.float32))
    newer = dataclasses.replace(calibration, versions={"onnxruntime": "1.1", "qpipe": "0.1"})
    joined = {"onnxruntime": "1.0, 1.1", "qpipe": "0.1"}
    assert merge(calibration, newer).versions == merge(newer, calibration).versions == joined
    assert merge(merge(calibration, newer), newer).versions == joined
