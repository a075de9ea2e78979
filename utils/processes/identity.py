"""Telling a process from a later one that got the same number."""

from __future__ import annotations

from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def identity_of(pid: int) -> tuple[str, str]:
    """The boot of the machine, and when the process was started since then.

    Raises:
        OSError: there is no such process, or the system has no /proc.
    """
    # The second field, the name in parentheses, may hold anything; the start time is the 22nd.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return BOOT.read_text(encoding="ascii").strip(), fields[19]
