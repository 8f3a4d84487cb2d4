"""Sample data from files and scripts as batches: dictionaries from input name to array, one at a time."""

from __future__ import annotations

from .feed import Feed, FeedOptions, Fingerprint, samples_in, take
from .signature import Batch, InputInfo, conform, inputs_of
from .sources import KINDS, batches, random_batches

__all__ = [
    "KINDS",
    "Batch",
    "Feed",
    "FeedOptions",
    "Fingerprint",
    "InputInfo",
    "batches",
    "conform",
    "inputs_of",
    "random_batches",
    "samples_in",
    "take",
]
