"""Several processes find, bit for bit, what one process finds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser
from qpipe.calibrate.errors import DataError, EnvironmentError_, UsageError
from qpipe.pipeline.calibration import load, parallel
from qpipe.pipeline.calibration.observe import Detail
from qpipe.pipeline.cli import main
from qpipe.pipeline.graph import from_proto
from qpipe.pipeline.graph import save as save_model
from qpipe.pipeline.interrupts import Interrupted
from qpipe.pipeline.stages.collect import Checkpoints, CollectOptions, collect

TENSORS = ["x", "a", "y"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 64] x) => (float[N, 64] y)'
        "{ a = MatMul (x, w) y = Softmax (a) }"
    )
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    save_model(from_proto(proto), path)
    return path


def batches(count: int = 23) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    for index in range(count):
        if index % 7 == 0:
            yield {"x": np.zeros((0, 64), np.float32)}
        yield {"x": rng.standard_normal((1 + index % 5, 64)).astype(np.float32)}


def run(model: Path, path: Path, workers: int, data=None, details: bool = True, warn=None, **checkpoints) -> bytes:
    options = CollectOptions(
        details={"x": Detail(gram=True), "a": Detail()} if details else {},
        workers=workers,
        warn=warn,
        checkpoints=Checkpoints(path=path, **checkpoints),
    )
    collect(model, TENSORS, batches() if data is None else data, options)
    return path.read_bytes()


@pytest.mark.parametrize("details", [True, False])
def test_two_processes_write_the_bytes_of_one(model, tmp_path, details):
    pytest.importorskip("joblib")
    one = run(model, tmp_path / "one.qcal", 1, details=details)
    assert run(model, tmp_path / "two.qcal", 2, details=details) == one
    assert load(tmp_path / "one.qcal").skipped == 4


def test_a_model_in_memory_is_handed_over_by_a_file(model, tmp_path):
    pytest.importorskip("joblib")
    options = CollectOptions(workers=2)
    found = collect(onnx.load(model), TENSORS, batches(5), options)
    assert found.tensors["a"].histogram == collect(model, TENSORS, batches(5)).tensors["a"].histogram


def test_stopped_in_parallel_it_goes_on_in_one_process(model, tmp_path):
    pytest.importorskip("joblib")

    def interrupted() -> Iterator[dict[str, np.ndarray]]:
        for index, batch in enumerate(batches()):
            if index == 12:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    path = tmp_path / "a.qcal"
    with pytest.raises(Interrupted):
        run(model, path, 2, data=interrupted(), batches=1)
    assert 0 < load(path).samples < load_samples(model, tmp_path)
    assert run(model, path, 1, resume=True) == (tmp_path / "whole.qcal").read_bytes()


def load_samples(model: Path, folder: Path) -> int:
    run(model, folder / "whole.qcal", 1)
    return load(folder / "whole.qcal").samples


def test_an_error_in_a_process_is_the_users_error(model):
    pytest.importorskip("joblib")
    spoiled = [*batches(3), {"x": np.full((1, 64), np.nan, np.float32)}]
    with pytest.raises(DataError, match="output 'y' is not finite"):
        collect(model, TENSORS, spoiled, CollectOptions(workers=2))


class Deadly:
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple:
        return os._exit, (1,)


def test_a_lost_process_costs_nothing_but_time(model, tmp_path):
    pytest.importorskip("joblib")
    psutil = pytest.importorskip("psutil")
    one = run(model, tmp_path / "one.qcal", 1)
    lost, said = [], []

    def killing() -> Iterator[dict[str, np.ndarray]]:
        for index, batch in enumerate(batches()):
            if index == 14:
                lost.extend(p for p in psutil.Process().children() if "LokyProcess" in " ".join(p.cmdline()))
                lost[0].kill()
            yield batch

    assert run(model, tmp_path / "two.qcal", 2, data=killing(), warn=said.append) == one
    assert lost
    assert [words for words in said if "died" in words], said


def test_batches_that_kill_every_process_are_given_up(model):
    pytest.importorskip("joblib")
    job = parallel.Job(tensors=tuple(TENSORS))
    groups = [list(batches(1)), [{"x": Deadly()}]]
    with pytest.raises(EnvironmentError_, match="died 3 times at the same batches"):
        list(parallel.observe_in_parallel(str(model), job, 2, groups))


def test_without_joblib_the_remedy_is_named(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "joblib", None)
    with pytest.raises(EnvironmentError_, match="joblib") as caught:
        collect(model, TENSORS, batches(2), CollectOptions(workers=2))
    assert "qpipe[cluster]" in caught.value.do


def test_a_process_keeps_its_session(model):
    job = parallel.Job(tensors=tuple(TENSORS))
    payload = parallel.pickle.dumps(job)
    parallel._runner.cache_clear()
    for _ in range(3):
        parallel._work(str(model), payload, list(batches(1)))
    assert parallel._runner.cache_info().misses == 1


def test_a_backend_that_gives_only_lists_does_the_same(model, tmp_path):
    """Ray's is one."""
    joblib = pytest.importorskip("joblib")

    class Lists(joblib._parallel_backends.LokyBackend):
        supports_return_generator = False

    joblib.register_parallel_backend("lists", Lists)
    one = run(model, tmp_path / "one.qcal", 1)
    with joblib.parallel_config("lists"):
        assert run(model, tmp_path / "two.qcal", 2) == one


@pytest.mark.parametrize(
    ("cluster", "error", "words"),
    [
        ("spark:host", UsageError, "no such kind of cluster"),
        ("dask", EnvironmentError_, "no dask cluster answers"),
        ("dask:tcp://127.0.0.1:9", EnvironmentError_, "no dask cluster answers"),
    ],
)
def test_a_cluster_that_is_not_there_is_named(model, monkeypatch, cluster, error, words):
    pytest.importorskip("distributed")
    monkeypatch.setattr("qpipe.pipeline.calibration.cluster._PATIENCE", 1)
    with pytest.raises(error, match=words):
        collect(model, TENSORS, batches(2), CollectOptions(workers=2, cluster=cluster))


@pytest.mark.slow
def test_the_command_line_uses_a_cluster_whose_workers_have_threads(model, tmp_path, monkeypatch, capfd):
    """Threads of one worker share a session and its counters; a relative path means the same to every worker."""
    distributed = pytest.importorskip("distributed")
    np.savez(tmp_path / "d.npz", x=np.concatenate([batch["x"] for batch in batches()]))
    (tmp_path / "m.onnx").write_bytes(model.read_bytes())
    monkeypatch.chdir(tmp_path)
    command = ["calibrate", "m.onnx", "--data", "d.npz", "--batch", "3", "-q"]
    assert main([*command, "-o", "one.qcal"]) == 0
    with distributed.LocalCluster(n_workers=1, threads_per_worker=3, processes=True, dashboard_address=None) as cluster:
        address = f"dask:{cluster.scheduler_address}"
        assert main([*command, "-o", "two.qcal", "--cluster", address, "--workers", "4"]) == 0, capfd.readouterr().err
    assert (tmp_path / "one.qcal").read_bytes() == (tmp_path / "two.qcal").read_bytes()


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_worker_writes_the_bytes_of_one(model, tmp_path):
    ray = pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    one = run(model, tmp_path / "one.qcal", 1)
    lost = []

    def killing() -> Iterator[dict[str, np.ndarray]]:
        for index, batch in enumerate(batches()):
            if index == 20:
                lost.extend(p for p in psutil.process_iter(["name"]) if p.info["name"].startswith("ray::PoolActor"))
                lost[0].kill()
            yield batch

    options = CollectOptions(
        details={"x": Detail(gram=True), "a": Detail()},
        workers=2,
        cluster="ray",
        checkpoints=Checkpoints(path=tmp_path / "two.qcal"),
    )
    try:
        ray.init(log_to_driver=False)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"this machine starts no Ray: {error}")
    try:
        collect(model, TENSORS, killing(), options)
    finally:
        ray.shutdown()
    assert lost
    assert (tmp_path / "two.qcal").read_bytes() == one


@pytest.mark.slow
def test_a_cluster_of_two_workers_writes_the_bytes_of_one(model, tmp_path):
    joblib = pytest.importorskip("joblib")
    distributed = pytest.importorskip("distributed")
    one = run(model, tmp_path / "one.qcal", 1)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        assert run(model, tmp_path / "two.qcal", 2) == one


@pytest.mark.slow
def test_a_lost_worker_of_the_cluster_costs_nothing_but_time(model, tmp_path):
    joblib = pytest.importorskip("joblib")
    distributed = pytest.importorskip("distributed")
    one = run(model, tmp_path / "one.qcal", 1)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config("dask"),
    ):
        victims = client.run(os.getpid)

        def killing() -> Iterator[dict[str, np.ndarray]]:
            for index, batch in enumerate(batches()):
                if index == 14:
                    os.kill(next(iter(victims.values())), signal.SIGKILL)
                yield batch

        assert run(model, tmp_path / "two.qcal", 2, data=killing()) == one
