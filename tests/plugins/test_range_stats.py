"""RangeStatsHost against calibrate's own observers: the same statistics, bit for bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import parser
from qpipe import plugins
from qpipe.calibrate.errors import UnsupportedError
from qpipe.calibrate.stats.channel_amax import ChannelAmax
from qpipe.calibrate.stats.histogram import Histogram, HistogramObserver
from qpipe.calibrate.stats.tokens import as_tokens
from qpipe.plugins.range_stats.op import Attached, attach, read, release

pytestmark = pytest.mark.usefixtures("plugin_library")
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPECIAL = np.float32(
    [0, -0.0, np.nan, np.inf, -np.inf, 1e30, -1e30, 9.99e29, 3.4e38, -3.4e38, 1e-45, -1e-40, 2**-126, 65504]
)


def model(kind: str = "float") -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["": 17]> g ({kind}[a, b] x) => ({kind}[a, b] y) {{ y = Neg (x) }}'
    return parser.parse_model(text)


def open_session(attached: Attached, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    plugins.register(options)
    return ort.InferenceSession(attached.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def values(rng: np.random.Generator, shape: tuple[int, int], special: float, dtype: type) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32) * np.float32(10.0 ** rng.uniform(-6, 6))
    x[rng.random(shape) < 0.3] = 0  # as after a Relu
    chosen = rng.random(shape) < special
    x[chosen] = rng.choice(SPECIAL, chosen.sum())
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def assert_same_channels(got: ChannelAmax | None, expected: ChannelAmax) -> None:
    assert got is not None
    for field in ("amax", "total", "energy"):
        np.testing.assert_array_equal(getattr(got, field), getattr(expected, field))
    assert got.tokens == expected.tokens


@QUICK
@given(
    seed=st.integers(0, 2**32 - 1),
    batches=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    channels=st.integers(2, 700),
    special=st.sampled_from([0.0, 0.001, 0.5]),
    dtype=st.sampled_from([np.float32, np.float16]),
    threads=st.sampled_from([1, 3]),
)
def test_counters_equal_those_of_numpy(seed, batches, channels, special, dtype, threads) -> None:
    rng = np.random.default_rng(seed)
    attached = attach(model("float16" if dtype is np.float16 else "float"), ["x", "y"], channels=["y"])
    session = open_session(attached, threads)
    of_x, of_y, sums = HistogramObserver(), HistogramObserver(), None
    for tokens in batches:
        x = values(rng, (tokens, channels), special, dtype)
        session.run(["y"], {"x": x})
        of_x.update(x)
        of_y.update(-x)
        if tokens:
            one = ChannelAmax.of(as_tokens(-x))
            sums = one if sums is None else sums.merge(one)
    assert read(attached.keys["x"]) == (of_x.result(), None)
    histogram, counted = read(attached.keys["y"])
    assert histogram == of_y.result()
    if sums is not None:
        assert_same_channels(counted, sums)
    release(attached.keys.values())


def test_every_upper_half_has_its_bin() -> None:
    x = (np.arange(65536, dtype=np.uint32) << 16 | 0x1234).view(np.float32).reshape(256, 256)
    attached = attach(model(), ["x"])
    open_session(attached).run(["y"], {"x": x})
    assert read(attached.keys["x"])[0] == Histogram.of(x)


def test_every_bfloat16() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[a] x) => (float[a] z) { y = Cast <to = 16> (x)'
    text += " z = Cast <to = 1> (y) }"
    attached = attach(parser.parse_model(text), ["y"])
    x = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    options = ort.SessionOptions()
    plugins.register(options)
    ort.InferenceSession(attached.proto.SerializeToString(), options).run(["z"], {"x": x})
    with np.errstate(invalid="ignore"):
        expected = Histogram.of(x.astype(ml_dtypes.bfloat16))
    assert read(attached.keys["y"])[0] == expected


def test_reading_clears_when_asked() -> None:
    attached = attach(model(), ["x"], channels=["x"])
    session = open_session(attached)
    x = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    session.run(["y"], {"x": x})
    first, channels = read(attached.keys["x"], clear=True)
    assert first == Histogram.of(x)
    assert_same_channels(channels, ChannelAmax.of(x))
    assert read(attached.keys["x"]) == (Histogram.empty(), None)
    session.run(["y"], {"x": -x})
    assert read(attached.keys["x"])[0] == Histogram.of(-x)


def test_no_output_needs_to_be_fetched_and_no_tensor_is_counted_twice() -> None:
    attached = attach(model(), ["x", "y", "x"])
    assert sorted(attached.keys) == ["x", "y"]
    x = np.ones((2, 3), np.float32)
    assert open_session(attached).run(None, {"x": x})[1:] == [6, 6]
    assert read(attached.keys["y"])[0].lo == -1


def test_sessions_and_threads_count_together() -> None:
    """Two sessions on the same keys, eight threads: nothing is lost."""
    attached = attach(model(), ["x"], channels=["x"])
    sessions = [open_session(attached, threads) for threads in (1, 2)]
    arrays = [values(np.random.default_rng(i), (40 + i, 2000), 0.01, np.float32) for i in range(12)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: sessions[i % 2].run(["y"], {"x": arrays[i % 12]}), range(48)))
    expected = Histogram.empty()
    for x in arrays:
        one = Histogram.of(x)
        for _ in range(4):
            expected = expected.merge(one)
    histogram, channels = read(attached.keys["x"])
    assert histogram == expected
    assert channels.tokens == 4 * sum(len(x) for x in arrays)
    np.testing.assert_array_equal(channels.amax, np.max([ChannelAmax.of(as_tokens(x)).amax for x in arrays], axis=0))


def test_another_sentinel() -> None:
    attached = attach(model(), ["x"], sentinel=100.0)
    x = np.float32([[1, 99, 100, -101, 50]])
    open_session(attached).run(["y"], {"x": x})
    assert read(attached.keys["x"])[0] == Histogram.of(x, sentinel=100.0)


def test_unknown_tensors_and_keys() -> None:
    with pytest.raises(UnsupportedError, match="main graph"):
        attach(model(), ["z"])
    attached = attach(model(), ["x"])
    with pytest.raises(KeyError):
        read(attached.keys["x"])
    session = open_session(attached)
    release(attached.keys.values())
    session.run(["y"], {"x": np.ones((1, 1), np.float32)})
    with pytest.raises(KeyError):
        read(attached.keys["x"])


RUNS = {
    "one value": np.full(9000, 1.5),
    "zeros": np.zeros(9000),
    "zeros of both signs": np.resize([0.0, -0.0], 9001),
    "next to zero": np.resize([0.0, 1e-45, -1e-45, 1e-40, -1e-39, -0.0], 8190),
    "two values": np.resize([0.0, 1.0, 1.0], 4097),
    "runs": np.repeat(np.arange(-600, 600), 8),
    "runs and zeros": np.repeat(np.resize([0.0, 3.0, -3.0], 3000), 5),
    "runs and what is left out": np.repeat([np.nan, 2.0, np.inf, 0.0, -np.inf, 3e38, -2.0], 2000),
}


@pytest.mark.parametrize("sentinel", [1e30, np.inf])
@pytest.mark.parametrize("name", RUNS)
def test_values_in_a_row_are_all_counted(name: str, sentinel: float) -> None:
    x = RUNS[name].astype(np.float32)[None]
    attached = attach(model(), ["x"], sentinel=sentinel)
    session = open_session(attached)
    observer = HistogramObserver(sentinel)
    for part in (x, x[:, :5], x[:, ::3].copy(), np.negative(x)):
        session.run(["y"], {"x": part})
        observer.update(part)
    assert read(attached.keys["x"], clear=True)[0] == observer.result()
    session.run(["y"], {"x": x})
    assert read(attached.keys["x"])[0] == Histogram.of(x, sentinel)
    release(attached.keys.values())


@pytest.mark.slow
def test_counters_of_32_bits_do_not_overflow() -> None:
    x = np.resize(np.float32([-2.5, 1, 1, 1, 1, 1, 1, 1]), (1, 2**24))
    attached = attach(model(), ["x"])
    session = open_session(attached)
    for _ in range(300):  # 4.4e9 ones
        session.run([session.get_outputs()[1].name], {"x": x})
    histogram = read(attached.keys["x"])[0]
    counts = {0x3F80: 7 * 2**21 * 300, 0xC020: 2**21 * 300}
    assert dict(zip(histogram.ids.tolist(), histogram.counts.tolist(), strict=True)) == counts
    release(attached.keys.values())
