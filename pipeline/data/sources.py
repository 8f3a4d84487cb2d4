"""From what ``--data`` was given to an iterator of batches."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...calibrate.errors import DataError
from .arrays import count_samples, read_columns, read_npy, read_npz
from .scripts import iterate, run_script, split_script
from .signature import Batch, InputInfo, to_array

KINDS = "script.py[:function], .npz, .npy, a folder of them, polygraphy JSON (file or folder), test_data_set_* folders"

_DATA_SETS = "test_data_set_*"


def batches(
    argument: str | Path | Iterable[Any], *, inputs: Sequence[InputInfo] = (), batch: int = 1, seed: int | None = None
) -> Iterator[Batch]:
    """Yield batches, one at a time, from any kind of data source.

    Args:
        argument: A script (``script.py[:load_data]``), a file, a folder, or any iterable of dicts (a generator, a
            torch DataLoader, an object with ``get_next()``).
        inputs: What the model takes; needed where the data itself has no names.
        batch: Samples per batch, for files whose first axis counts samples. A folder of polygraphy JSON or a
            script yields the batches that it holds.
        seed: For a script: `seed_generators` with it, None to leave them alone.

    Raises:
        DataError: The data cannot be read, or there is none.
    """
    count = 0
    for item in _items(argument, inputs, batch, seed):
        count += 1
        yield _as_batch(item, inputs)
    if count == 0:
        raise DataError(
            "the data gave no samples",
            where=str(argument) if isinstance(argument, str | Path) else None,
            expected="at least one batch",
            do="check that load_data() yields dicts; a generator that was used up before gives nothing again",
        )


def known_samples(argument: Any) -> int | None:
    """Return how many samples a data source declares to hold; None for scripts and whatever else has to be run."""
    if not isinstance(argument, str | Path):
        return None
    path = Path(argument)
    if not path.is_dir():
        return count_samples(path)
    counts = [count_samples(file) for file in path.glob("*.npz")]
    return sum(n for n in counts if n) if counts and None not in counts else None


def _items(argument: Any, inputs: Sequence[InputInfo], batch: int, seed: int | None) -> Iterator[Any]:
    if not isinstance(argument, str | Path):
        return iterate(argument, None, "the data")
    script = split_script(str(argument))
    if script is not None:
        return run_script(*script, seed)
    path = Path(argument)
    if path.is_dir():
        return _folder(path, inputs, batch)
    if not path.is_file():
        raise DataError("no such data", where=str(path), expected=KINDS, do="check the path given to --data")
    return _file(path, inputs, batch)


def _file(path: Path, inputs: Sequence[InputInfo], batch: int) -> Iterator[Any]:
    readers: dict[str, Callable[[], Iterator[Any]]] = {
        ".npz": lambda: read_npz(path, batch),
        ".npy": lambda: read_npy(path, _only_input(path, inputs), batch),
        ".json": lambda: _polygraphy(path),
    }
    if path.suffix not in readers:
        if path.suffix in (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"):
            raise DataError(
                f"{path.suffix} files may hold pickled code; refused",
                where=str(path),
                expected=KINDS,
                do="load it in a script of your own (--data script.py) and yield dicts, or save it as .npz",
            )
        raise DataError(f"data of type {path.suffix or 'unknown'} cannot be read", where=str(path), expected=KINDS)
    return readers[path.suffix]()


def _folder(path: Path, inputs: Sequence[InputInfo], batch: int) -> Iterator[Any]:
    sets = sorted((entry for entry in path.glob(_DATA_SETS) if entry.is_dir()), key=_number)
    if sets or list(path.glob("input_*.pb")):
        return (_data_set(entry, inputs) for entry in sets or [path])
    records = sorted(path.glob("*.json"))
    if records:
        return (item for record in records for item in _polygraphy(record))
    files = sorted([*path.glob("*.npz"), *path.glob("*.npy")])
    columns = {file.stem: file for file in files if file.suffix == ".npy"}
    if inputs and len(columns) == len(files) and set(columns) == {info.name for info in inputs}:
        return read_columns(columns, batch)
    if not files:
        raise DataError("this folder holds no data", where=str(path), expected=KINDS)
    return (item for file in files for item in _file(file, inputs, batch))


def _number(path: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", path.name)
    return (int(digits[-1]) if digits else -1, path.name)


def _only_input(path: Path, inputs: Sequence[InputInfo]) -> str:
    if len(inputs) != 1:
        raise DataError(
            f"an .npy file holds one array without a name, and the model has {len(inputs)} inputs",
            where=str(path),
            expected=", ".join(str(info) for info in inputs) or "a model with one input",
            do="save all inputs by name: numpy.savez('data.npz', name=array, ...)",
        )
    return inputs[0].name


def _polygraphy(path: Path) -> Iterator[Any]:
    """Yield the feed dicts of a file written by polygraphy (``--save-inputs``): a list of them, or one."""
    from polygraphy.exception import PolygraphyException
    from polygraphy.json import load_json

    try:
        content = load_json(str(path))
    except (PolygraphyException, ValueError, KeyError, TypeError, OSError) as error:
        raise DataError("this is no polygraphy JSON file", where=str(path), found=str(error).strip()) from error
    yield from content if isinstance(content, list) else [content]


def _data_set(folder: Path, inputs: Sequence[InputInfo]) -> Batch:
    """Read ``input_0.pb``, ``input_1.pb``, ...: serialized tensors, in the order of the model's inputs."""
    files = sorted(folder.glob("input_*.pb"), key=_number)
    batch: Batch = {}
    for file in files:
        index, _ = _number(file)
        name, array = _read_tensor(file)
        known = any(info.name == name for info in inputs)
        if not known and index < len(inputs):
            name = inputs[index].name
        batch[name] = array
    return batch


def _read_tensor(path: Path) -> tuple[str, Any]:
    import onnx
    from google.protobuf.message import DecodeError

    tensor = onnx.TensorProto()
    try:
        tensor.ParseFromString(path.read_bytes())
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise DataError("a sample refers to another file; refused", where=str(path))
        return tensor.name, onnx.numpy_helper.to_array(tensor)
    except (DecodeError, ValueError, TypeError, KeyError) as error:
        raise DataError("this is no serialized tensor", where=str(path), found=str(error)) from error


def _as_batch(item: Any, inputs: Sequence[InputInfo]) -> Batch:
    if isinstance(item, Mapping):
        if not all(isinstance(name, str) for name in item):
            raise DataError("a batch has a key that is no name", found=str(list(item)), expected="{input name: array}")
        return {name: to_array(value) for name, value in item.items()}
    if len(inputs) == 1 and (isinstance(item, np.ndarray) or hasattr(item, "detach")):
        return {inputs[0].name: to_array(item)}
    raise DataError(
        f"a batch is a {type(item).__name__}",
        expected=f"a dict {{input name: array}}, inputs: {', '.join(info.name for info in inputs) or 'by name'}",
        do="yield dicts in load_data()",
    )


def random_batches(
    inputs: Sequence[InputInfo], n: int, seed: int = 0, *, batch: int = 1, sizes: Mapping[str, int] | None = None
) -> Iterator[Batch]:
    """Yield ``n`` samples of random numbers; says nothing about a model, and is used only when asked for.

    Floats are standard normal, integers and booleans 0 or 1. An open first axis gets ``batch``, another open axis
    16 unless ``sizes`` names it.

    Args:
        inputs: What the model takes.
        n: Number of samples.
        seed: Seed of the generator; the same seed gives the same numbers.
        batch: Samples per batch.
        sizes: Size by name of a symbolic axis.
    """
    generator = np.random.default_rng(seed)
    for start in range(0, n, batch):
        count = min(batch, n - start)
        yield {info.name: _random(generator, info, count, sizes or {}) for info in inputs}


def _random(generator: np.random.Generator, info: InputInfo, count: int, sizes: Mapping[str, int]) -> Any:
    shape = []
    for axis, dim in enumerate(info.shape or ()):
        free = count if axis == 0 else 16
        shape.append(dim if isinstance(dim, int) and dim >= 0 else sizes.get(str(dim), free))
    if info.dtype.kind == "O":
        raise DataError("random data cannot be made for text", where=f"input {info.name!r}", do="give real --data")
    if info.dtype.kind in "iub":
        return generator.integers(0, 2, shape).astype(info.dtype)
    return generator.standard_normal(shape, dtype=np.float32).astype(info.dtype)
