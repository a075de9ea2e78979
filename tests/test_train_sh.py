"""train.sh with real processes: what it starts, how it quotes, and what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import ROOT

STUB = """\
import json, os, sys
world = os.environ.get("WORLD_SIZE")
line = json.dumps({"argv": sys.argv, "directory": os.getcwd(), "pid": os.getpid(), "world": world})
os.write(1, f"{line}\\n".encode())  # at once, since several processes write
sys.exit(int(os.environ.get("STUB_STATUS", "0")))
"""
TORCHRUN = [sys.executable, "-m", "utils.processes.launch"]


class Repository:
    """A folder (a space in its name) with train.sh, configs and a main.py that prints its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "config").mkdir(parents=True)
        (folder / "utils" / "processes").mkdir(parents=True)
        for name in (
            "train.sh",
            "utils/__init__.py",
            "utils/processes/__init__.py",
            "utils/processes/launch.py",
            "utils/processes/interrupt.py",
        ):
            shutil.copy(ROOT / name, folder / name)
        (folder / "main.py").write_text(STUB)

    def config(self, text: str, name: str = "config.test") -> str:
        """Writes a config and returns its path from the repository."""
        (self.folder / "config" / name).write_text(text)
        return f"config/{name}"

    def train(
        self, *arguments: str, directory: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs train.sh in the repository or another directory; its own variables are not inherited."""
        inherited = {
            key: value for key, value in os.environ.items() if key not in ("NPROC", "TORCHRUN", "FASTDIR")
        }
        return subprocess.run(
            ["bash", str(self.folder / "train.sh"), *arguments],
            cwd=directory or self.folder,
            env={**inherited, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def arguments(self, *arguments: str, directory: Path | None = None, **environment: str) -> list[str]:
        """Runs train.sh and returns the arguments that the program received."""
        done = self.train(*arguments, directory=directory, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)["argv"][1:]

    def printed(self, *arguments: str, **environment: str) -> list[str]:
        """The words of the command that --print shows."""
        done = self.train("--print", *arguments, **environment)
        assert (done.returncode, done.stderr) == (0, "")
        return shlex.split(done.stdout)

    def error(self, *arguments: str, **environment: str) -> str:
        """The one line that train.sh writes when it refuses to start anything."""
        done = self.train(*arguments, **environment)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("train.sh: error: ")
        assert done.stderr.count("\n") == 1
        return done.stderr


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "a repository")


OLD_STYLE = """\
 # ImageNet, two bits
 dataset='imagenet'
 root=$FASTDIR/data/imagenet
 model='resnet18'
 base=1
 epochs=90
 train_batch=256
 val_batch=50
#case='another'
 case='lsq-resnet18-2bit'
 keyword='lsq,imagenet'
 pretrained='none'

 options="$options --lr 1e-2 --wd 1e-4"
 options="$options --nesterov"
 [ -n "$SWITCHED_ON" ] && options="$options --never"
"""
OLD_STYLE_ARGUMENTS = [
    *("--dataset", "imagenet", "--root", "./data/imagenet", "--model", "resnet18", "--base", "1"),
    *("--epochs", "90", "-b", "256", "-v", "50", "--case", "lsq-resnet18-2bit", "--keyword", "lsq,imagenet"),
    *("--pretrained", "none", "--lr", "1e-2", "--wd", "1e-4", "--nesterov"),
]


def test_old_style_config_runs_unchanged(repository: Repository) -> None:
    assert repository.arguments(repository.config(OLD_STYLE)) == OLD_STYLE_ARGUMENTS


def test_command_line_follows_the_config(repository: Repository) -> None:
    config = repository.config(OLD_STYLE)
    more = ["--lr", "0.5", "-b", "2"]
    assert repository.arguments(config, *more) == [*OLD_STYLE_ARGUMENTS, *more]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("dataset=\nmodel=''\n", []),
        ("val_batch=0\n", ["-v", "0"]),
        ("root='/data/my images'\n", ["--root", "/data/my images"]),
        ("case='it'\\''s \"x\"  $y *'\n", ["--case", 'it\'s "x"  $y *']),
        ("options='--a\t1\n  --b *  '\n", ["--a", "1", "--b", "*"]),
        (
            "options='--x $(touch injected) `touch injected`'\n",
            ["--x", "$(touch", "injected)", "`touch", "injected`"],
        ),
        ("IFS=,\noptions='--a 1,2 --b'\n", ["--a", "1,2", "--b"]),
        ("options=\"--a '1,2' --b \\\"x  y\\\" --c ''\"\n", ["--a", "1,2", "--b", "x  y", "--c", ""]),
        ("options=' '\n", []),
        ("unset options\n", []),
        ("false\n", []),
        ("mode=check\nmodel=$mode\n", ["--model", "check"]),
    ],
)
def test_values_arrive_as_written(repository: Repository, text: str, expected: list[str]) -> None:
    assert repository.arguments(repository.config(text)) == expected
    assert not (repository.folder / "injected").exists()


def test_arguments_with_spaces_survive(repository: Repository) -> None:
    words = ["--case", "a b", "--root", "", "*", "x'y"]
    assert repository.arguments(repository.config(""), "--", *words) == ["--", *words]


def test_environment_does_not_leak_into_the_config(repository: Repository) -> None:
    config = repository.config("epochs=1\n")
    assert repository.arguments(config, root="/elsewhere", options="--x", script="y") == ["--epochs", "1"]


def test_dotenv_comes_before_the_config(repository: Repository) -> None:
    (repository.folder / ".env").write_text("FASTDIR='/fast disk'\nmodel=a\noptions='--seed 3'\n")
    config = repository.config('root="$FASTDIR/x"\nmodel=b\noptions="$options --lr 1"\n')
    expected = ["--root", "/fast disk/x", "--model", "b", "--seed", "3", "--lr", "1"]
    assert repository.arguments(config) == expected


def test_any_working_directory(repository: Repository, tmp_path: Path) -> None:
    config = repository.config("epochs=1\n")
    done = repository.train(config, directory=tmp_path)
    assert done.returncode == 0
    assert Path(json.loads(done.stdout)["directory"]) == repository.folder
    (tmp_path / "mine").write_text("epochs=2\n")
    assert repository.arguments("mine", directory=tmp_path) == ["--epochs", "2"]
    assert repository.arguments(str(tmp_path / "mine")) == ["--epochs", "2"]


def test_bare_config_name_is_not_searched_in_path(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "named").write_text("epochs=1\n")
    (repository.folder / "named").write_text("epochs=2\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert repository.arguments("named", PATH=path) == ["--epochs", "2"]


@pytest.mark.parametrize(
    ("text", "arguments", "script"),
    [
        ("", [], "main.py"),
        ("", ["tools.py"], "tools.py"),
        ("script=tools.py\n", [], "tools.py"),
        ("script=tools.py\n", ["main.py"], "main.py"),
        ("script=\n", [], "main.py"),
    ],
)
def test_script(repository: Repository, text: str, arguments: list[str], script: str) -> None:
    shutil.copy(repository.folder / "main.py", repository.folder / "tools.py")
    done = repository.train(repository.config(text), *arguments, "--lr", "1")
    assert json.loads(done.stdout)["argv"] == [script, "--lr", "1"]


@pytest.mark.parametrize("status", [0, 1, 2, 77])
def test_exit_status_is_the_training_s(repository: Repository, status: int) -> None:
    assert repository.train(repository.config(""), STUB_STATUS=str(status)).returncode == status


def test_training_takes_the_launcher_s_process(repository: Repository) -> None:
    (repository.folder / "main.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    # Killed by the signal itself: no shell in between turned it into 128 + 15.
    assert repository.train(repository.config("")).returncode == -15


def test_python_of_the_repository_s_environment(repository: Repository) -> None:
    interpreter = repository.folder / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(sys.executable)
    assert repository.printed(repository.config(""), PYTHON="") == [".venv/bin/python", "main.py"]
    assert repository.printed(repository.config(""))[0] == sys.executable
    interpreter.unlink()
    assert repository.printed(repository.config(""), PYTHON="")[0] == "python3"


def test_printed_command_is_the_one_that_runs(repository: Repository) -> None:
    (repository.folder / ".env").write_text("FASTDIR='/fast disk'\n")
    words = [repository.config(OLD_STYLE.replace("$FASTDIR/data", '"$FASTDIR"/da*ta')), "--case", "it's\na b"]
    printed = repository.train("--print", *words).stdout
    run = subprocess.run(
        ["bash", "-c", printed], cwd=repository.folder, capture_output=True, text=True, check=True
    )
    received = json.loads(run.stdout)["argv"]
    assert received == ["main.py", *repository.arguments(*words)]
    assert received[3:5] == ["--root", "/fast disk/da*ta/imagenet"]


SINGLE: list[str] = []


def standalone(processes: int) -> list[str]:
    return ["--standalone", "--nproc_per_node", str(processes)]


@pytest.mark.parametrize(
    ("text", "arguments", "environment", "launcher"),
    [
        ("", [], {}, SINGLE),
        ("nproc=1\n", [], {}, SINGLE),
        ("nproc=3\n", [], {}, standalone(3)),
        ("", [], {"NPROC": "2"}, standalone(2)),
        ("nproc=3\n", [], {"NPROC": "2"}, standalone(2)),
        ("nproc=3\n", [], {"NPROC": "1"}, SINGLE),
        ("", ["-g", "0"], {}, SINGLE),
        ("", ["-g", "0,1"], {}, standalone(2)),
        ("", ["-g", "0,1,"], {}, standalone(2)),
        ("", ["-g", "0", "1", "2", "--lr", "1"], {}, standalone(3)),
        ("", ["-g0,1"], {}, standalone(2)),
        ("", ["-g=0,1"], {}, standalone(2)),
        ("", ["--device_ids", "2,3"], {}, standalone(2)),
        ("", ["--device-ids", "2", "3"], {}, standalone(2)),
        ("", ["--device_ids=4,5,6"], {}, standalone(3)),
        ("", ["--device-ids=4"], {}, SINGLE),
        ("", ["--lr_custom_step", "30,60"], {}, SINGLE),
        ("", ["-g", "0", "--lr_custom_step", "30,60"], {}, SINGLE),
        ("options='-g 0,1'\n", [], {}, standalone(2)),
        ("options='-g 0,1'\n", ["-g", "3"], {}, SINGLE),
        ("options='-g 0'\n", ["-g", "0,1,2"], {}, standalone(3)),
        ("nproc=2\n", ["-g", "0,1"], {}, standalone(2)),
        (
            "torchrun='--nnodes 2  --node_rank 1'\n",
            [],
            {},
            ["--nproc_per_node", "1", "--nnodes", "2", "--node_rank", "1"],
        ),
        ("nproc=4\n", [], {"TORCHRUN": "--nnodes=2"}, ["--nproc_per_node", "4", "--nnodes=2"]),
        (
            "torchrun=--nnodes=3\n",
            ["-g", "0,1"],
            {"TORCHRUN": "--nnodes=2"},
            ["--nproc_per_node", "2", "--nnodes=2"],
        ),
    ],
)
def test_processes(
    repository: Repository, text: str, arguments: list[str], environment: dict[str, str], launcher: list[str]
) -> None:
    command = repository.printed(repository.config(text), *arguments, **environment)
    start = command[: command.index("main.py")]
    assert start == ([*TORCHRUN, *launcher] if launcher else [sys.executable])


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_two_real_processes(repository: Repository) -> None:
    done = repository.train(repository.config("nproc=2\nepochs=1\n"))
    assert done.returncode == 0, done.stderr
    started = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["argv"] for each in started] == [["main.py", "--epochs", "1"]] * 2
    assert [each["world"] for each in started] == ["2", "2"]
    assert started[0]["pid"] != started[1]["pid"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no config given; write: bash train.sh config/config.NAME"),
        (["--print"], "no config given"),
        (["--lr", "1"], "'--lr' stands where the config belongs"),
        (["config"], "'config' is a directory"),
        (["config/config.tset"], "no config 'config/config.tset'; close names: config/config.test;"),
        (["config/unlike"], "no config 'config/unlike'; the folder config/"),
        (["config/config.test", "mian.py"], "no script 'mian.py'"),
        (
            ["config/config.test", "--check"],
            "--check comes before the config; write: bash train.sh --check config/config.test",
        ),
        (["config/config.test", "main.py", "--print"], "--print comes before the config"),
    ],
)
def test_mistakes_on_the_command_line(repository: Repository, arguments: list[str], message: str) -> None:
    repository.config("epochs=1\n")
    assert message in repository.error(*arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("if true\n", "not valid shell, correct it: config/config.test: line"),
        (
            "model=a\nepochs = 3\n",
            "config/config.test: line 2: no such command: epochs = 3 (an assignment is",
        ),
        ("case=my run-of-mine\n", "line 1: no such command: case=my run-of-mine"),
        ("root=$(no-such-command)\n", "line 1: no such command: root=$(no-such-command)"),
        ("model=a\nexit 0\n", "config/config.test: ends the shell"),
        ("options=(--lr 1)\n", 'options is an array; write options="$options --name VALUE"'),
        ('options="--case \'a b"\n', "options has a quote without its partner"),
        ("epochs=1\r\n", "has the line ends of Windows; remove them: sed -i"),
        ("script=missing.py\n", "no script 'missing.py'"),
        ("nproc=0\n", "'0' processes make no sense"),
        ("nproc=two\n", "'two' processes make no sense"),
        ("nproc=3\noptions='-g 0,1'\n", "3 processes but 2 device(s) in -g; set NPROC=2"),
    ],
)
def test_mistakes_in_a_config(repository: Repository, text: str, message: str) -> None:
    assert message in repository.error(repository.config(text))


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("epoch=3", "epochs"),
        ("keywords=lsq", "keyword"),
        ("train_bath=4", "train_batch"),
        ("pretrain=none", "pretrained"),
        ("option='--lr 1'", "options"),
        ('options=--a\noption="$options --b"', "options"),
        ("EPOCHS=3", "epochs"),
        ("modle=x", "model"),
        ("epoch+=3", "epochs"),
        ("f() { epoch=3; }\nf", "epochs"),
        ("if true; then\n  epoch=3\nfi", "epochs"),
        ("if true; then epoch=3; fi", "epochs"),
        ("if false; then base=2; else epoch=3; fi", "epochs"),
        ("for i in 1; do epoch=$i; done", "epochs"),
        ("case x in x) epoch=3 ;; esac", "epochs"),
        ("declare epoch=3", "epochs"),
        ("readonly epoch=3", "epochs"),
        ("typeset -i base=2 epoch=3", "epochs"),
        ('keyword="$keyword,x" epoch=3', "epochs"),
        ("epoch=$(echo 'a b' | tr b c) # a remark", "epochs"),
        ("cat >/dev/null <<END\nbase=2\nEND\nepoch=3", "epochs"),
        ("source config/parent", "epochs"),
    ],
)
def test_a_misspelt_variable(repository: Repository, line: str, meant: str) -> None:
    """With --check, which executes nothing, too."""
    repository.config("epoch=5\n", "parent")
    config = repository.config(f"{line}\nbase=1\n")
    for flags in ([], ["--print"], ["--check"]):
        text = repository.error(*flags, config)
        assert text.startswith("train.sh: error: config/config.test sets ")
        assert text.endswith(f" and never uses it; did you mean {meant}?\n")


@pytest.mark.parametrize(
    ("text", "named"), [("arch=resnet18\n", "arch"), ("lr=0.1\n", "lr"), ("a=1; lr=0.1\n", "a lr")]
)
def test_another_variable_that_is_not_used(repository: Repository, text: str, named: str) -> None:
    """Old configs may have some: the run starts all the same."""
    done = repository.train(repository.config(f"epochs=1\n{text}"))
    assert json.loads(done.stdout)["argv"] == ["main.py", "--epochs", "1"]
    assert done.stderr == (
        f"train.sh: warning: config/config.test sets {named} and never uses it; another setting is written "
        'options="$options --NAME VALUE"\n'
    )


@pytest.mark.parametrize(
    "text",
    [
        "epoch=3\nepochs=$epoch",
        "epoch=(3 4)\nepochs=${epoch[1]}",
        "epoch=3\nepochs=$((epoch * 2))",
        "epoch=3\n[[ -v epoch ]] && epochs=4",
        "epoch=3\nf() { epochs=${epoch:-1}; }\nf",
        "epoch=3\nwhich=epoch\nepochs=${!which}",
        "epoch=3\neval 'epochs=$epoch'",
        "epoch=3\nsource config/parent",
        'here=config\nepoch=3\n. "$here/parent"',
        "export epoch=3\nepochs=$epoch",
        "export OMP_NUM_THREADS=1",
        "epoch=3\nexport epoch",
        "cat >/dev/null <<END\nepoch=3\nEND",
        "cat >/dev/null <<-'END'\n\tepoch=3\n\tEND",
        "options='\nepoch=3\n'\noptions=",
        'options="$(echo "x")\nepoch=3\n"\noptions=',
        "epoch=3 base='a b' true",
        "set -a\nepoch=3",
        "for epoch in 1 2; do base=1; done",
        "epoch=3 true",
        "# epoch=3\nbase=1 # epoch=4",
        "options=\"--name 'epoch=3'\"",
    ],
)
def test_variables_that_are_used(repository: Repository, text: str) -> None:
    repository.config('epochs="$epoch"\n', "parent")
    config = repository.config(f"{text}\n")
    for flag in ("--print", "--check"):
        done = repository.train(flag, config)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("text", ["export epoch=3", "declare -x epoch=3"])
def test_an_exported_variable_may_be_for_another_program(repository: Repository, text: str) -> None:
    config = repository.config(f"{text}\n")
    for flag in ("--print", "--check"):
        done = repository.train(flag, config)
        assert done.returncode == 0
        assert done.stderr == (
            "train.sh: warning: config/config.test exports epoch, which nothing here reads; did you mean epochs?\n"
        )


def test_a_variable_of_dotenv_needs_no_use(repository: Repository) -> None:
    """It may be for other configs; a config may use it."""
    (repository.folder / ".env").write_text("epoch=3\narch=x\n")
    assert repository.arguments(repository.config("epochs=$epoch\n")) == ["--epochs", "3"]
    assert repository.arguments(repository.config("base=1\n")) == ["--base", "1"]


def test_missing_interpreter(repository: Repository) -> None:
    assert "no interpreter 'no-python-here'" in repository.error(
        repository.config(""), PYTHON="no-python-here"
    )


def test_mistake_in_dotenv(repository: Repository) -> None:
    (repository.folder / ".env").write_text("FASTDIR = /data\n")
    assert ".env: line 1: no such command: FASTDIR = /data" in repository.error(repository.config(""))


def test_check_executes_nothing(repository: Repository) -> None:
    done = repository.train("--check", repository.config("touch executed\n"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (repository.folder / "executed").exists()
    assert "not valid shell" in repository.error("--check", repository.config("fi\n"))


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(repository: Repository, flag: str) -> None:
    done = repository.train(flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: bash train.sh")


def test_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "train.sh")], check=True)


def test_shellcheck() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(ROOT / "train.sh")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
