"""tools.py in the process of the tests."""

from tests.utils.tools.conftest import call

__all__ = ["call"]
