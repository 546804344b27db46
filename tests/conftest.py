"""Settings shared by all tests."""

import os

from hypothesis import HealthCheck, settings

# The first example of a test pays for compilation and lazy imports, so time limits per example would only be noise.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")
