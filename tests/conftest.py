"""Hypothesis profiles: `dev` (small, the default), `ci` (larger, derandomised; chosen by CI or HYPOTHESIS_PROFILE)."""

import os

from hypothesis import HealthCheck, settings

_SLOW_DATA = [HealthCheck.too_slow, HealthCheck.filter_too_much]

settings.register_profile("dev", max_examples=25, deadline=None, suppress_health_check=_SLOW_DATA)
settings.register_profile(
    "ci", max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=_SLOW_DATA
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))
