#!/usr/bin/env bash
# MNN 3.6.1: its command line tools (`mnnconvert`), or `import MNN.tools`.
# Expected: an import changes nothing on the machine.
# Seen: it runs `pip install -U aliyun-log-python-sdk` by the first pip of the PATH, which need not be that of the
# environment; with this package the tools fetch credentials from a server at each start, and report conversions to it.
# A pip that only writes down what it was asked stands in for the real one here, so that nothing is installed or sent.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check MNN==3.6.1 numpy==2.4.6
mkdir "$folder/bin"
printf '#!/bin/sh\necho "$@" >>"%s/asked"\n' "$folder" >"$folder/bin/pip"
chmod +x "$folder/bin/pip"
touch "$folder/asked"
PATH="$folder/bin:$PATH" "$folder/venv/bin/python" -c 'import MNN' >"$folder/log" 2>&1
echo "import MNN asks pip for: $(cat "$folder/asked")"
[[ ! -s "$folder/asked" ]]
PATH="$folder/bin:$PATH" "$folder/venv/bin/python" -c 'import MNN.tools' >>"$folder/log" 2>&1
echo "import MNN.tools asks pip for: $(head -1 "$folder/asked")"
grep -q '^install -U aliyun-log-python-sdk$' "$folder/asked"
