"""Equalization: functions that give a ``channel_scale [in]``; weights are multiplied by it, activations divided."""

from __future__ import annotations
