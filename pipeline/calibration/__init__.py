"""Calibration: statistics of a model's activations, their ``.qcal`` file and the tables of other tools."""

from __future__ import annotations

from .identity import ModelIdentity, identify
from .qcal import load, save
from .record import Calibration, TensorStats, merge
from .tables import read_table, write_table

__all__ = [
    "Calibration",
    "ModelIdentity",
    "TensorStats",
    "identify",
    "load",
    "merge",
    "read_table",
    "save",
    "write_table",
]
