"""The examples of docs/distributed.md, as they are written but for names and sizes, as dry runs.

Of two of them train.sh prints the commands, which test_train_sh.py shows to be those that it runs: another example runs
the same ones.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.kill import free_port
from tests.test_guide import NEEDED

SMALL = (
    "--dataset fake --keyword cifar10,origin,cbsa,dorefa,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2 "
    "--width_alpha 0.125 --input_size 16 --fake_size 32 -b 4 -v 4 --epochs 1 --case page --dry_run --verbose"
)
# In the place of SLURM's commands: two tasks on machines that are all this one.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  printf '%s\\n' "$1" >>srun-options
  shift
done
tasks=()
for number in 0 1; do
  SLURM_NODEID=$number SLURM_PROCID=$number SLURM_LOCALID=0 "$@" &
  tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || exit; done
"""
SCONTROL = """#!/usr/bin/env bash
[[ $* == "show hostnames a[1-2]" ]] && printf '127.0.0.1\\n127.0.0.2\\n'
"""


def blocks() -> list[str]:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    return re.findall(r"^```sh\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


PRINTED = {  # the block: what the commands of train.sh have beside the options
    0: ["main.py", "-m utils.processes.launch --standalone --nproc_per_node 2 main.py"],
    2: [
        f"-m utils.processes.launch --nproc_per_node 1 --nnodes 2 --node_rank {rank} --master_addr 127.0.0.1 "
        "--master_port {port} main.py"
        for rank in range(2)
    ],
}


def test_every_way_of_starting_is_there() -> None:
    text = "\n".join(blocks())
    for command in (
        "train.sh",
        "main.py",
        "utils.processes.launch",
        "srun",
        "TORCHRUN=",
        "NPROC=",
        "--distributed",
    ):
        assert command in text
    assert len(blocks()) == 5 and text.count("srun") == text.count("srun --kill-on-bad-exit=1") == 2


@pytest.mark.parametrize("number", range(5))
def test_an_example(tmp_path: Path, number: int, interpreter: str) -> None:
    for name in NEEDED:
        source = ROOT / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
    (tmp_path / "config" / "config.NAME").write_text(f'options="$options {SMALL}"\n')
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    block, port = blocks()[number], str(free_port())
    text = block
    for written, instead in (
        (r" CONFIG\b", " config/config.NAME"),
        (r" (--keyword )?\.\.\.", f" {SMALL}"),
        (r"\bfirst\.host\b", "127.0.0.1"),
        (r"\b29500\b", port),
        (r"\bNPROC=4\b", "NPROC=1"),
        *([] if torch.cuda.device_count() > 2 else [(r"-g 0 1 2\b", "-g 0")]),
    ):
        text = re.sub(written, instead, text)
    if number in PRINTED:
        text = text.replace("train.sh ", "train.sh --print ")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "MASTER_"))
        and name not in ("NPROC", "TORCHRUN", "WORLD_SIZE", "RANK", "PYTHONDONTWRITEBYTECODE")
    }
    done = subprocess.run(
        ["bash", "-e", "-c", f"{text}\nwait"],
        cwd=tmp_path,
        env={
            **inherited,
            "PYTHON": interpreter,
            "PYTHON_EXEC": interpreter,  # of torchrun
            "PATH": os.pathsep.join([str(commands), str(Path(interpreter).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NODELIST": "a[1-2]",
            **({} if "scontrol" in block else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    # Lines of c10d ([W...] and the frames below them) come from launchers that leave one after the other.
    assert not re.search(r"^\S+: (error|failed): |^Traceback", done.stderr, re.MULTILINE), done.stderr
    for line, expected in zip(block.splitlines(), PRINTED.get(number, []), strict=False):
        assert "train.sh" in line
        assert f"{interpreter} {expected.format(port=port)} --dataset fake" in done.stdout, done.stdout
    count = {0: 2, 2: 0}.get(number, 1)  # lines that begin a run; each line of the others is a part of one
    assert done.stdout.count("dry run: everything checked, nothing trained") == count
    assert count == 0 or re.search(r"^  world_size: 2$", done.stdout, flags=re.MULTILINE)
