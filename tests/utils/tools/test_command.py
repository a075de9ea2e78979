"""tools.py as a command: its words, exit statuses and streams, and the examples of its page."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tools
from tests import ROOT
from tests.utils.checkpoint.malicious import Malicious
from tests.utils.tools.commands import STATE, Call, lists, run
from utils.checkpoint import archive

# --- the command line ------------------------------------------------------------------------


def test_help_lists_every_word_without_loading_torch() -> None:
    """The heavy packages are imported after the command line is understood."""
    command = [sys.executable, "-X", "importtime", "tools.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for word in tools.WORDS:
        assert re.search(rf"^  {word} ", done.stdout, re.MULTILINE)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "PIL", "tqdm"}


@pytest.mark.parametrize(
    "words",
    ["load --old", "plan --budget_size 1KiB --new x.yaml --old", "export --to onnx --new x.onnx --old",
     "verify --old x.pth.tar"],
)  # fmt: skip
def test_a_pipe_is_no_file(call: Call, tmp_path: Path, words: str) -> None:
    """Reading one that nobody writes to would never end."""
    os.mkfifo(tmp_path / "pipe")
    status, out, err = call("--keyword", *words.split(), str(tmp_path / "pipe"))
    assert (status, out) == (2, "") and "pipe is a pipe or a device: name a file" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--keyword"),
        (["--keyword", ""], "0 words are given; write one of compare, report, verbose, load"),
        (["--keyword", "raw"], "0 words are given"),
        (["--keyword", "verbos", "--old", "x"], "did you mean verbose?"),
        (["--keyword", "verify_image", "--root", "x"], "did you mean verify-image"),
        (
            ["--keyword", "qqq"],
            "no such word of compare, report, verbose, load, save, update, swap, sort, verify-image, verify-data, ",
        ),
        (["--keyword", "load,save", "--old", "x"], "2 words are given"),
        (["--keyword", "update,row"], "--keyword row: no such word"),
        (["--keyword", "verbose"], "the word verbose needs --old"),
        (["--keyword", "verbose,raw", "--old", "x"], "raw means nothing to the word verbose"),
        (["--keyword", "load", "--old", "x", "--new", "y"], "--new means nothing to the word load"),
        (["--keyword", "load", "--old", "x", "--force"], "--force means nothing to the word load"),
        (["--keyword", "load", "--older", "x"], "unrecognized arguments: --older; did you mean --old"),
        (["--keyword", "load", "--qqq", "x"], "unrecognized arguments: --qqq; see python tools.py --help"),
        (["--keyword", "verify-image", "--root", "x", "-j", "0"], "'0' is not a number of 1 or more"),
        (["--keyword", "load", "--old", "missing.pth"], "missing.pth: cannot be read (No such file"),
    ],
)
def test_mistakes(call: Call, arguments: list[str], text: str) -> None:
    """Status 2 and one line on standard error."""
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("tools.py: error: ") and text in err
    assert err.count("\n") == 1


def test_real_commands_end_with_their_status(tmp_path: Path, old: Path) -> None:
    """A mistake, a damaged file and a success."""
    mistake = run("--keyword", "lod", "--old", old)
    assert (mistake.returncode, mistake.stdout) == (2, "")
    assert mistake.stderr.startswith("tools.py: error: --keyword lod: no such word of ")
    assert mistake.stderr.endswith("; did you mean load?\n")

    cut = tmp_path / "cut.pth.tar"
    cut.write_bytes(old.read_bytes()[:700])
    damaged = run("--keyword", "load", "--old", cut)
    assert (damaged.returncode, damaged.stdout) == (2, "")
    assert damaged.stderr.startswith(f"tools.py: error: {cut}: damaged, cut short")
    assert damaged.stderr.count("\n") == 1

    done = run("--keyword", " load ", "--old", old)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{old}: loads as a network's weights, under state_dict\n4 entries, 12 elements\n"


def test_a_file_with_code_is_refused(call: Call, tmp_path: Path) -> None:
    """Status 2 and the name of what is in it."""
    path = tmp_path / "code.pth.tar"
    torch.save({"state_dict": STATE, "x": Path("x")}, path)
    status, out, err = call("--keyword", "verbose", "--old", path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"tools.py: error: {path}: refused, because it holds pathlib.")


# import reads a packed file and plan a text, which cannot hold code.
READS = sorted({name for name, word in tools.WORDS.items() if "old" in word.needs} - {"import", "plan"})


@pytest.mark.parametrize("word", READS)
def test_code_in_a_checkpoint_is_refused_and_not_run(call: Call, tmp_path: Path, word: str) -> None:
    """By every word that reads one, with all else that it asks for; nothing is written."""
    path, trace, new = tmp_path / "code.pth.tar", tmp_path / "trace", tmp_path / "new.pth.tar"
    torch.save({"state_dict": STATE, "x": Malicious(f"touch {trace}")}, path)
    mf, mt = lists(tmp_path, "fc.bias\n", "head.bias\n")
    given = {"old": path, "new": new, "mf": mf, "mt": mt, "to": "program"}
    arguments = [
        part for name in tools.WORDS[word].needs if name in given for part in (f"--{name}", given[name])
    ]
    (tmp_path / "network.xml").touch()
    arguments += [mf] * ("images" in tools.WORDS[word].needs)
    arguments += [tmp_path / "network.xml"] * ("files" in tools.WORDS[word].needs)
    status, out, err = call("--keyword", word, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{path}: refused, because it holds " in err
    assert not trace.exists() and not new.exists()
    torch.load(path, weights_only=False)  # it would have
    assert trace.exists()


def test_words_that_read_checkpoints() -> None:
    assert {"load", "save", "swap", "update", "verbose"} <= set(READS)


def test_names_show_no_control_characters(call: Call, tmp_path: Path) -> None:
    """They could move the cursor, or look like lines of their own."""
    path = tmp_path / "odd.pth.tar"
    archive.save(path, {"a\x1b[2J\nb": torch.ones(1), "../../x": torch.ones(2), "\u00e9": torch.ones(1)})
    for options in ((), ("--verbose_list", "all")):
        status, out, _ = call("--keyword", "verbose", "--old", path, *options)
        assert status == 0 and "\x1b" not in out
        assert [line.split()[0] for line in out.splitlines()[1:-1]] == [r"a\x1b[2J\nb", "../../x", "\u00e9"]
    archive.save(path, {"state_dict": {"w": torch.ones(1)}, "k\x1b[2J": 3})
    assert (
        r"keys: state_dict, k\x1b[2J=3; weights under state_dict"
        in call("--keyword", "verbose", "--old", path)[1]
    )


def test_a_reader_that_stops_early(tmp_path: Path) -> None:
    """`tools.py ... | head`: no traceback."""
    path = tmp_path / "long.pth"
    torch.save({f"layer{i}.{'x' * 50}": torch.zeros(1) for i in range(2000)}, path)
    command = f"{sys.executable} tools.py --keyword verbose --old {path} | head -n 2"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 2
    assert done.stderr == ""


# --- the documentation -----------------------------------------------------------------------


def test_the_examples_of_the_documentation(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command of docs/tools.md prints what is shown there."""
    text = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (setup,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    Path("setup.py").write_text(setup)
    runpy.run_path("setup.py")
    words: set[str] = set()
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for command, shown in re.findall(r"^\$ (.*)\n((?:[^$\n].*\n)*)", block, re.MULTILINE):
            program, *arguments = shlex.split(command)
            if program == "cat":
                printed = Path(arguments[0]).read_text()
            else:
                assert (program, arguments[0]) == ("python", "tools.py")
                _, out, err = call(*arguments[1:])
                printed = out + err
                words.add(arguments[2].partition(",")[0])
            # how much of a cut image is left over depends on Pillow's version
            left_over = r"\(\d+ bytes not processed\)"
            assert re.sub(left_over, "", printed) == re.sub(left_over, "", shown), command
    # the others are of runs, see test_runs.py and report/html/test_page.py, and of networks, see tests/model/deploy and
    # tests/model/mixed
    of_networks = {"export", "import", "predict", "verify", "sensitivity", "plan"}
    assert words == set(tools.WORDS) - {"compare", "report"} - of_networks
