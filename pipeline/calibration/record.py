"""The record that calibration leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...calibrate.errors import DataError
from ...calibrate.stats.channel_amax import ChannelAmax
from ...calibrate.stats.gram import Gram
from ...calibrate.stats.histogram import Histogram
from .identity import ModelIdentity


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStats:
    """Statistics of one tensor.

    Attributes:
        histogram: Always there.
        channels: Magnitudes per channel, where asked for.
        gram: ``XᵀX`` over tokens, where asked for.
    """

    histogram: Histogram
    channels: ChannelAmax | None = None
    gram: Gram | None = None

    def merge(self, other: TensorStats) -> TensorStats:
        """Return the statistics of both streams."""
        return TensorStats(
            histogram=self.histogram.merge(other.histogram),
            channels=_both(self.channels, other.channels),
            gram=_both(self.gram, other.gram),
        )


def _both(one: Any, other: Any) -> Any:
    """Merge two optional statistics; a stream without tokens has none."""
    if one is None or other is None:
        return one if other is None else other
    return one.merge(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Statistics of a model's activations over some data: the content of a ``.qcal`` file.

    Attributes:
        tensors: Statistics by tensor, in topological order of the model.
        samples: Number of samples seen.
        skipped: Number of batches left out because they had no elements.
        model: The model that the statistics belong to.
        data: Fingerprint of the data, one per stream that was merged, sorted.
        options: What the collection depends on, e.g. the sentinel threshold, and whether the data was random.
        versions: Versions of the programs that collected.
        not_covered: Tensors that were asked for and could not be observed, with the reason.
    """

    tensors: dict[str, TensorStats]
    samples: int = 0
    skipped: int = 0
    model: ModelIdentity = field(default_factory=ModelIdentity)
    data: tuple[Mapping[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    not_covered: Mapping[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """What the data was: ``"random"``, or the start of the fingerprint of each stream."""
        if self.options.get("random"):
            return "random"
        return "sha256:" + ",".join(str(entry["running"])[:16] for entry in self.data)

    def merge(self, other: Calibration) -> Calibration:
        """Return the statistics of both; histograms exactly, in any order; see `merge`."""
        return merge(self, other)

    def check_model(self, model: ModelIdentity, *, where: str = "statistics") -> None:
        """Refuse to serve another model; see `ModelIdentity.check`."""
        self.model.check(model, where=where)


def merge(one: Calibration, other: Calibration) -> Calibration:
    """Return what one collection over both streams of data would have found.

    Histograms and counts merge exactly; the float64 sums of channel statistics and Gram matrices are added.

    Raises:
        DataError: The two belong to different models, cover different tensors or were collected with other options.
    """
    one.model.check(other.model, where="files to merge")
    for what, mine, theirs in (
        ("tensors", dict.fromkeys(one.tensors), dict.fromkeys(other.tensors)),
        ("options", dict(one.options), dict(other.options)),
        ("tensors not covered", dict(one.not_covered), dict(other.not_covered)),
    ):
        if mine != theirs:
            different = sorted(key for key, _ in set(mine.items()) ^ set(theirs.items()))
            raise DataError(
                f"the calibration files do not fit together: other {what}",
                found=", ".join(dict.fromkeys(different[:5])),
                do="collect both with the same version and options",
            )
    return dataclasses.replace(
        one,
        tensors={name: stats.merge(other.tensors[name]) for name, stats in one.tensors.items()},
        samples=one.samples + other.samples,
        skipped=one.skipped + other.skipped,
        versions=_joined(one.versions, other.versions),
        data=tuple(sorted([*one.data, *other.data], key=lambda entry: sorted(entry.items()))),
    )


def _joined(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    parts = {
        key: {p for side in (one, other) if key in side for p in side[key].split(", ")} for key in {**one, **other}
    }
    return {key: ", ".join(sorted(parts[key])) for key in sorted(parts)}
