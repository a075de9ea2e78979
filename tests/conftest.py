"""Helpers of several test files explain their failed assertions as tests do."""

import signal

import pytest

# A shell starts its background jobs with the signal ignored, and the processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("tests.main", "tests.model", "tests.utils")
