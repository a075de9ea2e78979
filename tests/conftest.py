"""Helpers of several test files explain their failed assertions as tests do."""

import pytest

pytest.register_assert_rewrite("tests.main", "tests.model", "tests.utils")
