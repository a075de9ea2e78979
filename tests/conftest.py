"""Helpers of several test files explain their failed assertions as tests do."""

import signal

import pytest

# A shell starts its background jobs with SIGINT ignored, and nohup starts all with SIGHUP ignored. The processes that
# tests start would inherit that.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

pytest.register_assert_rewrite("tests.main", "tests.model", "tests.utils")
