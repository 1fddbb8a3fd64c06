"""For all tests. Time is measured in benchmarks and never asserted: hypothesis sets no deadline."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
