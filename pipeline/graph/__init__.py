"""Models as graphs: load, save, ask, check. The only place that knows how ONNX files store weights."""

from __future__ import annotations

from .checking import check, check_proto
from .constants import constant, recast, stored_size, values
from .exporter import to_proto
from .identity import Topology, begin_hash, model_hash, topology
from .importer import clone, from_proto
from .lazy import Lazy, by_rows
from .model import Model
from .queries import all_graphs, constants, consumers, fresh_name, producer
from .reading import load
from .writing import EXTERNAL_THRESHOLD, save

__all__ = [
    "EXTERNAL_THRESHOLD",
    "Lazy",
    "Model",
    "Topology",
    "all_graphs",
    "begin_hash",
    "by_rows",
    "check",
    "check_proto",
    "clone",
    "constant",
    "constants",
    "consumers",
    "fresh_name",
    "from_proto",
    "load",
    "model_hash",
    "producer",
    "recast",
    "save",
    "stored_size",
    "to_proto",
    "topology",
    "values",
]
