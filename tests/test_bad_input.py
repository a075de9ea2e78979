"""What a user can get wrong on the command line: one line, exit status 2, no traceback, nothing written."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.main.runs import done_in
from tests.starter import Run, starter

MAIN, TOOLS = ROOT / "main.py", ROOT / "tools.py"
TRAIN, NEXT = ROOT / "train.sh", ROOT / "start_on_terminate.sh"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("NPROC", "TORCHRUN", "FASTDIR")},
    "PYTHON": sys.executable,
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}

TINY = "--dataset fake --width_alpha 0.125 --input_size 16 -b 8 --fake_size 32 --lr 0.05 --epochs 1"
FP = f"{TINY} --keyword cifar10,cbas,origin"
LSQ = f"{TINY} --keyword cifar10,cbas,origin,dorefa,lsq --fm_enable --wt_enable --fm_bit 4 --wt_bit 4"


class Command:
    """What the malicious checkpoint would do to whoever unpickles it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """A call instead of data."""
        return os.system, ("touch pwned",)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that can be named wrongly: checkpoints, data, keyword files and configs."""
    folder = done_in(tmp_path_factory.mktemp("world"), f"{FP} --case fp", f"{LSQ} --case lsq")
    whole = (folder / "weights" / "resnet20" / "fp-checkpoint.pth.tar").read_bytes()
    (folder / "cut.pth.tar").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (folder / "flipped.pth.tar").write_bytes(flipped)
    (folder / "empty.pth.tar").write_bytes(b"")
    (folder / "text.pth.tar").write_text("no checkpoint\n", encoding="utf-8")
    torch.save({"state_dict": Command()}, folder / "evil.pth.tar")
    (folder / "pickled.pth.tar").write_bytes(pickle.dumps({"state_dict": Command()}))
    torch.save([1, 2, 3], folder / "list.pth.tar")
    payload = torch.load(folder / "weights" / "resnet20" / "fp-checkpoint.pth.tar", weights_only=True)
    torch.save(payload["state_dict"], folder / "bare.pth.tar")
    (folder / "blocked").write_text("a file where a folder is asked for\n", encoding="utf-8")
    (folder / "no_images" / "train" / "cat").mkdir(parents=True)
    (folder / "no_images" / "val" / "cat").mkdir(parents=True)
    (folder / "raises.py").write_text("raise ValueError('one\\ntwo')\n", encoding="utf-8")
    (folder / "syntax.py").write_text("register(\n", encoding="utf-8")
    (folder / "config.spaces").write_text("epochs = 3\n", encoding="utf-8")
    (folder / "config.syntax").write_text("if then\n", encoding="utf-8")
    (folder / "config.good").write_text("dataset=fake\nkeyword=cifar10\nepochs=1\n", encoding="utf-8")
    (folder / "config.two").write_text("dataset=fake\noptions='-g 0 1'\n", encoding="utf-8")
    (folder / "bits.yaml").write_text("- {name: layer9.*, bit: 4}\n", encoding="utf-8")
    (folder / "few.yaml").write_text("- {name: layer1.*, bit: 1}\n", encoding="utf-8")
    (folder / "wrong.yaml").write_text("- {name: layer1.*, bits: 4}\n", encoding="utf-8")
    (folder / "names.a").write_text("conv1.weight\n", encoding="utf-8")
    (folder / "names.b").write_text("stem.weight\nfc.bias\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def started(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs Python programs in it from a process that has loaded torch."""
    with starter(world, tmp_path_factory.mktemp("output"), ENVIRONMENT) as run:
        yield run


@pytest.fixture(scope="module")
def plain(world: Path) -> Run:
    """Runs Python programs and shell scripts as a user does."""

    def run(program: Path, line: str) -> subprocess.CompletedProcess[str]:
        interpreter = ["bash"] if program.suffix == ".sh" else [sys.executable, "-W", "error"]
        return subprocess.run(
            [*interpreter, str(program), *line.split()],
            cwd=world,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below a folder with its content's hash or, for a folder, nothing."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def check(world: Path, run: Run, program: Path, line: str, words: str, speaker: str = "") -> None:
    """Run a program in the folder and check that it, or the `speaker`, fails as a user's mistake should."""
    before = snapshot(world)
    done = run(program, line)
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"{speaker or program.name}: error: "), lines[0]
    for word in words.split():
        assert word in lines[0], lines[0]
    assert (done.returncode, done.stdout) == (2, "")
    assert snapshot(world) == before


# The line; words that the message must have: the option, and where it helps what to write instead.
BEFORE_ANYTHING_IS_LOADED = [
    ("--epoch 3", "--epoch --epochs"),
    ("resnet20", "resnet20 --help"),
    ("--fm_bit", "--fm_bit needs a value"),
    ("--fm_bit two", "--fm_bit two"),
    ("--dataset mnist", "--dataset mnist digits"),
    ("--rank 1", "--rank --distributed"),
    ("-g 1 1", "--device_ids once"),
    ("-g -1", "--device_ids -1"),
    ("--keyword cifar10,cbos", "cbos cbas"),
    ("--keyword cifar10,NRelU", "NRelU NReLU"),
    ("--keyword cifar10,cbas,bacs", "cbas contradicts bacs"),
    ("--keyword cifar10,lq,pact", "lq contradicts pact"),
    ("--keyword cifar10,gamma,dorefa", "gamma contradicts dorefa"),
    ("--keyword cifar10,digits", "cifar10 contradicts digits"),
    ("--dataset cifar10 --keyword digits", "cifar10 contradicts digits"),
    ("--dataset fake", "fake --num_classes --input_size"),
    ("--dataset digits --num_classes 12", "--num_classes 12 10"),
    ("--keyword digits,cbas --fm_enable", "--fm_enable dorefa pact"),
    ("--keyword digits,dorefa --wt_enable", "order cbas bacs"),
    ("--keyword cbas,dorefa --fm_enable --fm_bit 0", "--fm_bit 0 1"),
    ("--keyword cbas,dorefa --fm_enable --fm_bit -2", "--fm_bit -2 1"),
    ("--keyword cbas,dorefa --fm_enable --fm_bit 33", "--fm_bit 33 16"),
    ("--keyword cbas,dorefa --fm_enable --fm_level 1", "--fm_level 1 2"),
    ("--keyword cbas,dorefa --fm_enable --fm_bit 2 --fm_level 9", "--fm_level 9 --fm_bit 4"),
    ("--keyword cbas,lsq --bits 2 --last_bit 64", "--last_bit '64' 1 16 32"),
    ("--keyword cbas,lsq --first_bit 8", "--first_bit 8 --bits"),
    ("--keyword cbas,xnor --bits 1 --first_last_bit 8", "--first_last_bit 8 xnor 256"),
    ("--keyword cbas,lsq --bits 2 --layer_bits none.yaml", "--layer_bits none.yaml"),
    ("--keyword cbas,lsq --bits 2 --layer_bits wrong.yaml", "--layer_bits 'bits' bit"),
    ("--keyword_file none.py", "--keyword_file none.py"),
    ("--keyword_file no_images", "--keyword_file no_images"),
    (f"--keyword_file {'long' * 100}", "--keyword_file longlong"),
    ("--keyword_file raises.py", "--keyword_file raises.py ValueError one two"),
    ("--keyword_file syntax.py --list_keywords", "--keyword_file syntax.py SyntaxError"),
    ("--lr nan", "--lr nan"),
    ("--lr inf", "--lr inf"),
    ("--lr -0.1", "--lr -0.1"),
    ("--weight_decay nan", "--weight_decay nan"),
    ("--width_alpha inf", "--width_alpha inf"),
    ("--width_alpha -1", "--width_alpha -1"),
    ("--label_smooth 1.5", "--label_smooth 1.5"),
    ("--momentum nan", "--momentum nan"),
    ("--grad_clip 0", "--grad_clip 0"),
    ("--delay inf", "--delay inf"),
    ("--fm_boundary nan", "--fm_boundary nan"),
    ("--mean 0,0 --std 1,1", "--mean three"),
    ("--mean 0,0,0", "--mean --std"),
    ("--std 0,1,1 --mean 0,0,0", "--std 0"),
    ("--epochs 0", "--epochs 0"),
    ("-b 0", "--batch_size 0"),
    ("-b 1", "--batch_size 1 2"),
    ("-v -1", "--val_batch_size -1"),
    ("-j -1", "--workers -1"),
    ("--seed -3", "--seed -3"),
    ("-e -v 0", "--evaluate --val_batch_size"),
    ("-r --resume_file cut.pth.tar", "--resume --resume_file"),
    ("--resume_file none.pth.tar", "--resume_file none.pth.tar"),
    (f"--resume_file {'long' * 100}", "--resume_file longlong"),
    ("--lr_policy cosine", "--lr_policy cosine cos"),
    ("--lr_policy step", "--lr_policy step fix_step"),
    ("--lr_policy sgdr --eta_min 1", "--eta_min 1.0 --lr"),
    ("--epochs 10 --lr_custom_step 5,20", "--lr_custom_step 20 --epochs 10"),
    ("--epochs 10 --lr_custom_step 5,5", "--lr_custom_step 5"),
    ("--epochs 10 --lr_custom_step 5,x", "--lr_custom_step 5,x"),
    ("--lr_decay 2", "--lr_decay 2"),
    ("--log_dir blocked", "--log_dir blocked"),
    ("--weights_dir blocked", "--weights_dir blocked"),
    ("--log_dir blocked/deeper -e", "--log_dir blocked"),
]


@pytest.mark.parametrize(("line", "words"), BEFORE_ANYTHING_IS_LOADED, ids=lambda text: text[:60])
def test_before_anything_is_loaded(world: Path, plain: Run, line: str, words: str) -> None:
    """Mistakes that show in the options alone."""
    check(world, plain, MAIN, line, words)


WITH_NETWORK_AND_DATA = [
    # Names and paths.
    ("--case=", "--case"),
    ("--case a/b", "--case a/b"),
    ("--case ../up", "--case ../up"),
    ("--pretrained fp-chekpoint.pth.tar", "--pretrained fp-chekpoint.pth.tar fp-checkpoint.pth.tar"),
    ("--dataset imagenet", "--root imagenet train/"),
    ("--dataset imagenet --root none", "--root none"),
    ("--dataset imagenet --root no_images", "no_images images cat"),
    ("--dataset cifar10 --root none", "--root none"),
    (f"{FP} --fake_size 1", "1 training image batch statistics 2"),
    ("--dataset digits -j 100000", "--workers 100000"),
    # Bits of single layers.
    (f"{LSQ} --case lsq --layer_bits bits.yaml", "--layer_bits layer9.* layer1.*"),
    (
        f"{LSQ} --case lsq --wt_grid midtread --layer_bits few.yaml",
        "--layer_bits entry 1 layer1.0.conv1.0 midtread",
    ),
    (f"{LSQ} --case lsq -r --first_bit 8", "lsq-checkpoint.pth.tar --first_bit none 8"),
    # The optimizer.
    ("--optimizer RMSprop", "--optimizer RMSprop SGD ADAM"),
    (f"{FP} --case fp --custom_lr_list claps --custom_lr 1", "--custom_lr_list claps"),
    (f"{FP} --case fp --custom_decay_list fcc --custom_decay 1", "--custom_decay_list fcc fc"),
    # The network.
    ("--model resnet19", "--model resnet19 resnet18"),
    ("--model resnet50 --keyword digits,cbas", "resnet50 bottlenecks origin"),
    (f"{LSQ} --fm_quant_group 3", "layer1.0.conv1.0 --fm_quant_group 3 8"),
    (f"{FP},group-norm --fm_quant_group 3", "group-norm --fm_quant_group 3 8 channels"),
    ("--keyword digits,bacs,origin,preBN,prone", "preBN contradicts prone"),
    (f"{FP} --input_size 1", "--input_size 1 resnet20"),
    (f"{FP} --input_size 30", "--input_size 30 resnet20"),
    (f"{FP} --input_size 32x30", "--input_size 32x30 resnet20"),
    # Checkpoints.
    (f"{FP} --pretrained cut.pth.tar", "cut.pth.tar damaged"),
    (f"{FP} --pretrained flipped.pth.tar", "flipped.pth.tar damaged checksum"),
    (f"{FP} --pretrained empty.pth.tar", "empty.pth.tar"),
    (f"{FP} --pretrained text.pth.tar", "text.pth.tar not PyTorch"),
    (f"{FP} --pretrained list.pth.tar", "list.pth.tar list"),
    (f"{FP} --pretrained evil.pth.tar", "evil.pth.tar refused system"),
    (f"{FP} --pretrained pickled.pth.tar", "pickled.pth.tar not PyTorch"),
    (f"{FP} --width_alpha 0.25 --pretrained fp-checkpoint.pth.tar", "shape --width_alpha conv1.weight"),
    (
        f"{FP} --model resnet32 --pretrained weights/resnet20/fp-checkpoint.pth.tar",
        "missing layer1.3 --model",
    ),
    (f"{FP} --pretrained lsq-checkpoint.pth.tar", "lsq-checkpoint.pth.tar unused quant_weight"),
    (f"{FP} --pretrained fp-checkpoint.pth.tar --unresume_scope fcc", "--unresume_scope fcc fc"),
    (f"{LSQ} -e --fm_bit 2 --wt_bit 2 --pretrained lsq-checkpoint.pth.tar", "16 4 levels write --bits 4"),
    (f"{FP} --resume_file evil.pth.tar", "evil.pth.tar refused"),
    (f"{FP} --resume_file bare.pth.tar", "bare.pth.tar epoch --pretrained"),
    (f"{FP} --case lsq -r", "lsq-checkpoint.pth.tar cannot continued"),
    (f"{FP} --case fp -r --optimizer ADAM", "--optimizer SGD ADAM"),
    (f"{FP} --case none -e -r", "--resume none checkpoint"),
]


@pytest.mark.parametrize(("line", "words"), WITH_NETWORK_AND_DATA, ids=lambda text: text[-60:])
def test_with_network_and_data(world: Path, started: Run, line: str, words: str) -> None:
    """Mistakes that only the network, a checkpoint or the data set shows, all before anything is written."""
    check(world, started, MAIN, line, words)


@pytest.mark.parametrize(
    ("program", "line", "words"),
    [
        (TRAIN, "", "config"),
        (TRAIN, "config/config.none", "config.none"),
        (
            TRAIN,
            "config/config.lsq.finetune.digits.2bit.resnet2O",
            "resnet2O config.lsq.finetune.digits.2bit.resnet20",
        ),
        (TRAIN, "--lr 0.1", "--lr config"),
        (TRAIN, "{world}/config.syntax", "shell config.syntax"),
        (TRAIN, "{world}/config.spaces", "config.spaces epochs ="),
        (TRAIN, "{world}/config.good none.py", "none.py"),
        (NEXT, "1", "PID config"),
        (NEXT, "pid config/config.none", "pid"),
        (TOOLS, "", "--keyword"),
        (TOOLS, "--keyword verbos --old cut.pth.tar", "verbos verbose"),
        (TOOLS, "--keyword verbose", "--old"),
        (TOOLS, "--keyword verbose --old none.pth.tar", "none.pth.tar"),
        (TOOLS, "--keyword verbose --old cut.pth.tar", "cut.pth.tar damaged"),
        (TOOLS, "--keyword load --old evil.pth.tar", "evil.pth.tar refused"),
        (
            TOOLS,
            "--keyword save --old weights/resnet20/fp-checkpoint.pth.tar --new bare.pth.tar",
            "bare.pth.tar --force",
        ),
        (
            TOOLS,
            "--keyword update --old bare.pth.tar --new new.pth.tar --mf names.a --mt names.b",
            "names.a names.b",
        ),
        (TOOLS, "--keyword verify-image --root none", "--root none"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else value.name,
)
def test_other_programs(world: Path, plain: Run, started: Run, program: Path, line: str, words: str) -> None:
    """The launchers and the tools."""
    check(world, started if program == TOOLS else plain, program, line.format(world=world), words)


@pytest.mark.parametrize(
    ("line", "words"),
    [("--lr nan", "--lr nan"), ("--keyword cifar10,cbos", "cbos cbas"), ("-b 1", "--batch_size 1")],
)
def test_a_mistake_through_the_launcher(world: Path, plain: Run, line: str, words: str) -> None:
    """The program's own line and status arrive."""
    check(world, plain, TRAIN, f"{world / 'config.good'} {line}", words, speaker="main.py")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{FP} --case fp --pretrained evil.pth.tar", "evil.pth.tar refused system"),
        (f"{LSQ} --case fp --fm_quant_group 5", "layer1.0.conv1.0 --fm_quant_group 5 8"),
    ],
)
def test_a_late_mistake_as_a_user_makes_it(world: Path, plain: Run, line: str, words: str) -> None:
    """From a cold start, in a case that has files, which are neither moved nor changed."""
    check(world, plain, MAIN, line, words)
