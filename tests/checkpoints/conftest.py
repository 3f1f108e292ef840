"""Models to read and write: those of the tests of compression."""

from tests.compress.conftest import compressed, models, originals

__all__ = ["compressed", "models", "originals"]
