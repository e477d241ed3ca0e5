"""Hypothesis profiles: 50 examples by default, ten times as many with ``HYPOTHESIS_PROFILE=props`` (``make props``)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Tensors are slow to draw beside a loaded machine, so no deadline and no complaint about a slow generator. The seed is
# fixed by default, so that a run on a fresh clone repeats; `props` explores.
settings.register_profile(
    "default", max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("props", settings.get_profile("default"), max_examples=500, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
