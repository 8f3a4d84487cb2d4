"""Weight algorithms: pure functions that turn ``w [out, in]`` (and input statistics) into a `QArray`."""

from __future__ import annotations
