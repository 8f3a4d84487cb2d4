"""The operators under ONNX Runtime's CUDA provider: values, CUDA graphs, overlapping runs, counters on the device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from outlier_models import Case, random_case
from qpipe import plugins
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.plugins.range_stats.device import DeviceCounters, attach

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_plugin")]

TYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def cuda_session(model: onnx.ModelProto, **provider_options: object):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    plugins.register(options)
    providers = [("CUDAExecutionProvider", provider_options)]
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def assert_close(case: Case, y: np.ndarray) -> None:
    expected, _ = case.expected()
    assert y.shape == expected.shape
    error = np.abs(y.astype(np.float64) - expected.astype(np.float64))
    # The kernels' two-part tf32 products and float32 sums in another order.
    assert (error <= 16 * case.tolerance()).all()


def run(session, case: Case) -> tuple[np.ndarray, int]:
    import onnxruntime

    binding = session.io_binding()
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
        case.x, onnx.helper.np_dtype_to_tensor_dtype(case.x.dtype)
    )
    binding.bind_ortvalue_input("x", value)
    for name in ("y", "new_outliers"):
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding)
    y, met = binding.get_outputs()
    return y.numpy().view(case.x.dtype), int(met.numpy())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 512), (3, 8, 300), (9, 1000), (2, 70, 768), (1024, 512)], ids=str)
@pytest.mark.parametrize(("outliers", "limit"), [(0, 0.0), (8, 0.0), (64, 3.0)])
def test_values(dtype: np.dtype, shape: tuple[int, ...], outliers: int, limit: float) -> None:
    case = random_case(11, shape, 520, outliers, dtype, limit=limit)
    y, met = run(cuda_session(case.model()), case)
    assert_close(case, y)
    assert met == case.expected()[1]


@pytest.mark.parametrize("rows", [4, 200])
def test_a_cuda_graph_repeats_the_result(rows: int) -> None:
    import onnxruntime

    case = random_case(12, (rows, 512), 256, 8, TYPES[1])
    case.counter = False
    session = cuda_session(case.model(), enable_cuda_graph="1")
    x = onnxruntime.OrtValue.ortvalue_from_numpy(case.x, "cuda", 0)
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type([rows, 256], np.float16, "cuda", 0)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", x)
    binding.bind_ortvalue_output("y", y)
    for seed in range(5):  # the third run is captured, later ones are replayed
        case.x = random_case(seed, (rows, 512), 256, 8, TYPES[1]).x
        x.update_inplace(case.x)
        session.run_with_iobinding(binding)
        assert_close(case, y.numpy())


def test_runs_may_overlap() -> None:
    cases = [random_case(13, (m, 512), 384, 8, TYPES[1]) for m in (2, 20, 150, 600)]
    session = cuda_session(cases[0].model())
    with ThreadPoolExecutor(4) as pool:
        for case, (y, _) in zip(cases * 8, pool.map(lambda c: run(session, c), cases * 8), strict=True):
            assert_close(case, y)


def test_counters_stay_on_the_device() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17]>
        g (float[n, 4000] x) => (float[n, 4000] y) { h = Relu(x) y = Sqrt(h) }"""
    )
    tensors = attach(proto, ["x", "h"])
    counters = DeviceCounters(cuda_session(proto), tensors)
    rng = np.random.default_rng(5)
    batches = [rng.normal(size=(n, 4000)).astype(np.float32) for n in (1, 37, 100)]
    for batch in batches:
        counters.run({"x": batch})
    everything = np.concatenate(batches)
    assert counters.take() == {"x": Histogram.of(everything), "h": Histogram.of(np.maximum(everything, 0))}
    (y,) = counters.run({"x": batches[0]}, ["y"])
    assert np.allclose(y, np.sqrt(np.maximum(batches[0], 0)), rtol=1e-5)
    assert counters.take()["x"] == Histogram.of(batches[0])
