#!/usr/bin/env bash
# fsspec 2026.9.0 with aiohttp 3.14.5: a part of a file behind http, from a server that knows no parts, as Python's own.
# Expected: cat_file(url, start=10, end=20) returns ten bytes or raises, as seeking in an opened file does.
# Seen: it returns the whole file, however long, without a word; with the file opened, reading from a place raises
# ValueError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check fsspec==2026.9.0 aiohttp==3.14.5
mkdir "$folder/served"
"$folder/venv/bin/python" - "$folder/served" <<'PYTHON'
import functools
import http.server
import sys
import threading
from pathlib import Path

import fsspec

Path(sys.argv[1], "numbers").write_bytes(bytes(range(256)) * 1000)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


handler = functools.partial(Quiet, directory=sys.argv[1])
http.server.ThreadingHTTPServer.handle_error = lambda *_: None  # the client hangs up when it sees no parts
with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    files, url = fsspec.filesystem("http"), f"http://127.0.0.1:{server.server_port}/numbers"
    part = files.cat_file(url, start=10, end=20)
    print(f"cat_file(start=10, end=20): {len(part):,} bytes, the first is {part[0]}")
    try:
        with files.open(url) as opened:
            opened.seek(10)
            seeking = f"{len(opened.read(10))} bytes"
    except ValueError as error:
        seeking = f"ValueError: {error}"
    print(f"open, seek(10), read(10): {seeking}")
    server.shutdown()
assert len(part) == 256_000 and part[0] == 0, "cat_file has changed"
assert seeking.startswith("ValueError"), "seeking has changed"
PYTHON
