"""Which cluster the processes of a collection run on: an existing engine behind joblib, not one of our own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ...calibrate.errors import EnvironmentError_, UsageError

_PATIENCE = 20  # seconds until a scheduler that does not answer counts as not there


@contextlib.contextmanager
def cluster_for_joblib(cluster: str | None) -> Iterator[None]:
    """Let ``joblib.Parallel`` inside the block run its tasks on a cluster.

    Args:
        cluster: ``"dask:ADDRESS"`` of a Dask scheduler, ``"ray"`` or ``"ray:ADDRESS"``; None leaves joblib as the
            caller has set it up (processes of this machine unless they chose otherwise).

    Raises:
        UsageError: No such kind of cluster.
        EnvironmentError_: A package is missing, or nothing answers at the address.
    """
    if cluster is None:
        yield
        return
    kind, _, address = cluster.partition(":")
    if kind not in _KINDS:
        raise UsageError("no such kind of cluster", found=cluster, expected="dask:ADDRESS, ray or ray:ADDRESS")
    try:
        connection = _KINDS[kind](address)
    except ImportError as error:
        raise EnvironmentError_(
            f"{kind} is not installed", found=str(error), do=f"pip install {_PACKAGES[kind]}"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise EnvironmentError_(
            f"no {kind} cluster answers",
            where=address or "the default address",
            found=f"{type(error).__name__}: {error}",
            do="start its scheduler, or check the address given to --cluster",
        ) from error
    with connection, joblib().parallel_config(kind):
        yield


def joblib() -> ModuleType:
    """Return joblib.

    Raises:
        EnvironmentError_: It is missing.
    """
    try:
        import joblib
    except ImportError as error:
        raise EnvironmentError_(
            "several workers need joblib", found=str(error), do="pip install 'qpipe[cluster]', or leave out --workers"
        ) from error
    return joblib  # type: ignore[no-any-return]


def _dask(address: str) -> contextlib.AbstractContextManager[Any]:
    import distributed

    if not address:
        raise ValueError("a Dask scheduler has an address such as tcp://10.0.0.1:8786")
    client: contextlib.AbstractContextManager[Any] = distributed.Client(address, timeout=_PATIENCE)
    return client


def _ray(address: str) -> contextlib.AbstractContextManager[Any]:
    import ray
    from ray.util.joblib import register_ray

    joblib()
    register_ray()
    # Without an address this is the cluster that RAY_ADDRESS names, or one of this machine alone.
    return ray.init(address=address or None, ignore_reinit_error=True, log_to_driver=False)  # type: ignore[no-any-return]


_KINDS: dict[str, Callable[[str], contextlib.AbstractContextManager[Any]]] = {"dask": _dask, "ray": _ray}
_PACKAGES = {"dask": "'qpipe[cluster]'", "ray": "'qpipe[ray]'"}
