"""Evaluations: their predictions, worst mistakes, calibration, and changes beside another network."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tools
from model.load import data_of, load_trained
from tests.main.runs import FP, LSQ, call, done_in, log_of
from tests.utils.data.helpers import validation, write_folder
from tests.utils.processes.lines import together
from utils.checkpoint import archive
from utils.report import confusion, run_files
from utils.report.calibration import calibration_error
from utils.report.html import page

SET = "--fake_size 120"  # 30 images for validation
E = "-e -v 4"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with networks in full precision and of 2 bits, and evaluations of the latter, `both` and `alone`."""
    folder = tmp_path_factory.mktemp("evaluation")
    pretrained = f"{E} --pretrained q-checkpoint.pth.tar"
    return done_in(
        folder,
        f"{FP} {SET} --case fp --epochs 1",
        f"{LSQ} {SET} --case q --epochs 1 --re_init --pretrained fp-checkpoint.pth.tar",
        f"{LSQ} {SET} --case both {pretrained} --reference fp-checkpoint.pth.tar",
        f"{LSQ} {SET} --case alone {pretrained}",
    )


@pytest.fixture(scope="module")
def wanted(world: Path) -> dict[str, Any]:
    """Probabilities, float64 [30, 10], of both networks by their checkpoints, and the classes."""
    found: dict[str, Any] = {}
    for case in ("q", "fp"):
        trained = load_trained(world / "weights" / "resnet20" / f"{case}-checkpoint.pth.tar")
        batches = list(validation(data_of(trained)))
        with torch.no_grad():
            logits = torch.cat([trained.network(images) for images, _ in batches]).double()
        found[case] = logits.softmax(1).numpy()
        found["true"] = torch.cat([target for _, target in batches]).numpy()
    return found


def test_predictions(world: Path, wanted: dict[str, Any]) -> None:
    """Every image once, in the order of the set, with the probabilities of the checkpoint's network."""
    folder, shares, true = world / "exp" / "both", wanted["q"], wanted["true"]
    rows = read(folder / "predictions.csv")
    assert [row["image"] for row in rows] == [str(i) for i in range(30)]
    assert [int(row["class"]) for row in rows] == true.tolist()
    assert [int(row["called"]) for row in rows] == shares.argmax(1).tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(shares.max(1), abs=1e-5)
    own = [float(row["class_probability"]) for row in rows]
    assert own == pytest.approx(shares[np.arange(30), true], abs=1e-5)
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    order = np.argsort(-shares, axis=1)[:, :5]
    assert [[int(name) for name in line["classes"]] for line in lines] == order.tolist()
    assert [line["image"] for line in lines] == [row["image"] for row in rows]
    assert [line["probabilities"][4] for line in lines] == pytest.approx(
        np.take_along_axis(shares, order, 1)[:, 4], abs=1e-5
    )


def test_worst_mistakes(world: Path, wanted: dict[str, Any]) -> None:
    """The images whose wrong class has the highest probability, as a picture and for the page."""
    found = confusion.read(world / "exp" / "both")
    shares, true = wanted["q"], wanted["true"]
    assert found is not None
    wrong = np.flatnonzero(shares.argmax(1) != true)
    worst = wrong[np.argsort(-shares.max(1)[wrong])][:24]
    assert [int(one.image) for one in found.mistakes] == worst.tolist()
    for one, i in zip(found.mistakes, worst, strict=True):
        assert one.title == str(true[i])
        assert one.caption == f"called {shares[i].argmax()} {100 * shares[i].max():.1f} %"
        assert Image.open(io.BytesIO(base64.b64decode(one.picture))).size == (16, 16)
    assert np.asarray(Image.open(world / "exp" / "both" / "mistakes.png").convert("L")).std() > 20


def test_calibration(world: Path, wanted: dict[str, Any]) -> None:
    """The bins in the file give the error that the log has."""
    shares, right = wanted["q"].max(1), wanted["q"].argmax(1) == wanted["true"]
    places = np.minimum((shares * 15).astype(int), 14)
    error = sum(
        (places == i).mean() * abs(right[places == i].mean() - shares[places == i].mean())
        for i in set(places)
    )
    found = confusion.read(world / "exp" / "both")
    assert found is not None and calibration_error(found.bins) == pytest.approx(error, abs=1e-5)
    assert sum(one.images for one in found.bins) == 30
    assert f"expected calibration error {100 * error:.2f} % (15 bins)" in log_of(world, "both")


def test_changed_classes(world: Path, wanted: dict[str, Any]) -> None:
    folder, true = world / "exp" / "both", wanted["true"]
    now, before = (wanted[case].argmax(1) for case in ("q", "fp"))
    rows, changed = read(folder / "changes.csv"), np.flatnonzero(now != before)
    assert [int(row["image"]) for row in rows] == changed.tolist() and len(changed)
    for row, i in zip(rows, changed, strict=True):
        assert [int(row[name]) for name in ("class", "reference", "called")] == [true[i], before[i], now[i]]
        assert float(row["reference_probability"]) == pytest.approx(wanted["fp"][i].max(), abs=1e-5)
        assert float(row["probability"]) == pytest.approx(wanted["q"][i].max(), abs=1e-5)
        kind = "right to wrong" if before[i] == true[i] else "wrong to other wrong"
        assert row["change"] == ("wrong to right" if now[i] == true[i] else kind)
    kinds = [sum(row["change"] == kind for row in rows) for kind in ("right to wrong", "wrong to right")]
    said = f"{len(rows)} of 30 images changed the class of the reference: {kinds[0]} right to wrong, {kinds[1]} wrong"
    assert said in log_of(world, "both")
    found = confusion.read(folder)
    assert found is not None and 0 < len(found.changes) == min(24, len(rows))
    highest = max(changed, key=lambda i: wanted["fp"][i].max())
    assert int(found.changes[0].image) == highest
    assert (folder / "changes.png").read_bytes().startswith(b"\x89PNG")


def test_files_of_an_earlier_evaluation_do_not_stay(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need a reference are not there without one, in the folder of an evaluation with one neither."""
    monkeypatch.chdir(world)
    names = {"changes.csv", "changes.png"}
    assert not names & {path.name for path in (world / "exp" / "alone").iterdir()}
    line = f"{LSQ} {SET} {E} --case again --pretrained q-checkpoint.pth.tar"
    assert call(f"{line} --reference fp-checkpoint.pth.tar") == 0
    assert names <= {path.name for path in (world / "exp" / "again").iterdir()}
    assert call(line) == 0
    assert not names & {path.name for path in (world / "exp" / "again").iterdir()}
    for name in ("predictions.csv", "predictions.jsonl", "calibration.csv", "mistakes.png", "pictures.json"):
        files = [(world / "exp" / case / name).read_bytes() for case in ("again", "alone")]
        assert files[0] == files[1], name


def test_several_processes_write_the_same(world: Path, interpreter: str) -> None:
    """Each has a part of the images, and the first one writes all of them, as one process does."""
    line = (
        f"{LSQ} {SET} -e -v 4 --pretrained q-checkpoint.pth.tar --reference fp-checkpoint.pth.tar --case two"
    )
    (world / "network.py").touch()
    done = together(interpreter, world, {"two": {"world": 2, "line": line}})
    assert done["two"]["status"] == [0, 0], done
    for name in ("predictions.csv", "predictions.jsonl", "calibration.csv", "changes.csv", "classes.csv",
                 "confusion.csv", "pictures.json", "mistakes.png", "changes.png"):  # fmt: skip
        one, two = ((world / "exp" / case / name).read_bytes() for case in ("both", "two"))
        assert one == two, name


def test_processes_with_few_images_or_none(tmp_path: Path, interpreter: str) -> None:
    """Of three images a fourth process has none; images tell which inputs lie below zero, if there are enough."""
    write_folder(tmp_path / "images", train=0, val=1)
    shutil.rmtree(tmp_path / "images" / "train")
    (tmp_path / "network.py").touch()
    line = (
        "--dataset imagenet --root images --num_classes 3 --keyword imagenet,cbas,origin,lsq,LReLU --bits 2 "
        "--model resnet20 --width_alpha 0.125 --input_size 16 -e -v 1 -j 0 --case few"
    )
    done = together(interpreter, tmp_path, {"few": {"world": 4, "line": line}})
    assert done["few"]["status"] == [0, 0, 0, 0], done
    assert "start at zero, and inputs below it are cut off" in log_of(tmp_path, "few")


def test_the_page_shows_them(world: Path, tmp_path: Path) -> None:
    text = page.render(run_files.read([world / "exp" / "q"]))
    assert "Worst mistakes" not in text
    (folder := tmp_path / "run").mkdir()
    for case in ("q", "both"):
        for path in (world / "exp" / case).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    (run,) = run_files.read([folder])
    text = page.render([run])
    assert run.confusion is not None
    assert text.count("<figure>") == len(run.confusion.mistakes) + len(run.confusion.changes)
    data = json.loads(text.rpartition('id="data">')[2].partition("</script>")[0])
    bars, _ = data["figures"]["reliability0"]["data"]
    assert bars["y"] == [100 * one.accuracy for one in run.confusion.bins]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("--reference fp-checkpoint.pth.tar", "has no effect without --evaluate: add -e"),
        ("-e --reference gone.pth.tar", "--reference gone.pth.tar"),
        ("-e --reference few.pth.tar", "few.pth.tar has 10 classes, and the evaluated network 7"),
        ("-e --reference small.pth.tar", "takes the images in another form, mean"),
        ("-e --reference bare.pth.tar", "bare.pth.tar holds no configuration"),
        ("-e --reference infinite.pth.tar", "infinite.pth.tar"),
    ],
)
def test_mistakes_of_a_reference(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, text: str
) -> None:
    """One line, before anything is written."""
    monkeypatch.chdir(world)
    payload = archive.read(world / "weights" / "resnet20" / "fp-checkpoint.pth.tar")
    archive.save(Path("few.pth.tar"), payload)
    archive.save(Path("small.pth.tar"), {**payload, "images": {**payload["images"], "mean": [0.1, 0.1, 0.1]}})
    archive.save(Path("bare.pth.tar"), {"state_dict": payload["state_dict"]})
    weights = {**payload["state_dict"], "fc.bias": torch.full((10,), torch.inf)}
    archive.save(Path("infinite.pth.tar"), {**payload, "state_dict": weights})
    classes = "--num_classes 7" if "few" in options else "--pretrained q-checkpoint.pth.tar"
    capsys.readouterr()
    assert call(f"{LSQ} {SET} --case wrong {classes} {options}") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and text in err, err
    assert not (world / "exp" / "wrong" / "predictions.csv").exists()


@pytest.mark.slow
def test_tools_write_the_files_of_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes as main.py, of images in class folders; of shards and a table with other names of the images."""
    write_folder(tmp_path / "images", train=4, val=5)
    line = (
        "--dataset imagenet --root images --keyword cbas,origin --width_alpha 0.125 --input_size 16 -b 4 -v 4 -j 0 "
        "--epochs 1"
    )
    for seed, case in enumerate(("one", "two")):
        assert call(f"{line} --case {case} --seed {seed}") == 0
    assert (
        call(f"{line} -e --case e --pretrained one-checkpoint.pth.tar --reference two-checkpoint.pth.tar")
        == 0
    )
    old, reference = (next(Path("weights").rglob(f"{case}-checkpoint.pth.tar")) for case in ("one", "two"))
    capsys.readouterr()

    def predict(*options: object) -> tuple[int, str, str]:
        arguments = ["--keyword", "predict", *options, "--old", old, "-b", 4, "--reference", reference]
        return tools.main([*map(str, arguments)]), *capsys.readouterr()

    status, out, _ = predict("images/val", "--to", "found")
    assert status == 0 and "expected calibration error" in out and "changed the class of the reference" in out
    assert f"{re.findall('top-1 .*', log_of(tmp_path, 'e'))[-1]}\n" in out
    names = sorted(path.name for path in Path("found").iterdir())
    assert {"classes.csv", "confusion.csv", "mistakes.png", "predictions.jsonl", "calibration.csv"} <= {
        *names
    }
    for name in names:
        assert (Path("found") / name).read_bytes() == (Path("exp/e") / name).read_bytes(), name

    rows = [f"{path},{path.parent.name},val" for path in sorted(Path("images/val").rglob("*.jpg"))]
    Path("table.csv").write_text("\n".join(["path,label,split", *rows]))
    make = ["--keyword", "make-shards", "--from", "images", "--to", "shards", "--shard_size", "8"]
    assert tools.main(make) == 0
    for place in ("shards", "table.csv"):
        status, _, err = predict(place, "--to", f"found-{place}")
        assert status == 0, err
        for name in ("classes.csv", "confusion.csv", "calibration.csv"):
            assert (Path(f"found-{place}") / name).read_bytes() == (Path("found") / name).read_bytes(), name

    status, out, err = predict("images/val", "--to", "found")
    assert (status, out) == (2, "") and "exists; --force writes over it" in err
    assert predict("images/val", "--to", "found", "--force")[0] == 0
    Path("images/val/ant").rename("images/val/wasp")
    status, out, err = predict("images/val", "--to", "other")
    assert (status, out, err.count("\n")) == (2, "", 1) and not Path("other").exists()
    assert (
        "--to other: the class of images/val/wasp/0.jpg is not known: images must lie in folders that" in err
    )
    assert predict("images/val")[0] == 0


def test_names_of_files_and_classes_may_be_any_bytes(tmp_path: Path) -> None:
    """Predictions name the files; a class that is not UTF-8 or has a line break is read again as it was written."""
    write_folder(tmp_path / "images", train=2, val=2)
    names = [os.fsdecode(b"caf\xe9"), "two\nlines \u2028 here", "$x_1$"]
    for part in ("train", "val"):
        for old, new in zip(("ant", "bee", "cat"), names, strict=True):
            (tmp_path / "images" / part / old).rename(tmp_path / "images" / part / new)
    line = "--dataset imagenet --root images --num_classes 3 --keyword cbas,origin --width_alpha 0.125 --input_size 16"
    assert call(f"{line} -e -j 0") == 0
    found = confusion.read(tmp_path / "exp" / "default")
    assert found is not None and found.classes == sorted(names)
    rows = read(tmp_path / "exp" / "default" / "predictions.csv")
    paths = sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "images" / "val").rglob("*.jpg"))
    assert sorted(row["image"] for row in rows) == paths
    assert {row["class"] for row in rows} == {*names}


def test_one_class(tmp_path: Path) -> None:
    """Everything is right, with a probability of 1."""
    assert call(f"{FP} -e --num_classes 1") == 0
    found = confusion.read(tmp_path / "exp" / "default")
    assert found is not None and (found.mistakes, calibration_error(found.bins)) == ([], 0)
    assert not (tmp_path / "exp" / "default" / "mistakes.png").exists()


def test_tools_list_changed_classes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The class of an image is its folder, where that has the name of one."""
    draw = np.random.default_rng(0)
    for i in range(40):
        folder = tmp_path / "photos" / ("strange" if i % 8 == 7 else str(i % 8))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((16, 16)).save(
            folder / f"{i}.png"
        )
    old, reference = (
        str(world / "weights" / "resnet20" / f"{name}-checkpoint.pth.tar") for name in ("q", "fp")
    )

    def predict(*options: str) -> tuple[int, str, str]:
        status = tools.main(["--keyword", "predict", "photos", "--old", old, *options])
        return status, *capsys.readouterr()

    single: dict[str, dict[str, str]] = {}
    for name, network in (("now", old), ("before", reference)):
        assert (
            tools.main(
                ["--keyword", "predict", "photos", "--old", network, "--topk", "1", "--output", f"{name}.csv"]
            )
            == 0
        )
        single[name] = {row["image"]: row["class"] for row in read(tmp_path / f"{name}.csv")}
    changed = [image for image, called in single["now"].items() if single["before"][image] != called]
    assert changed
    capsys.readouterr()
    status, out, _ = predict("--reference", reference, "--output", "x.csv")
    rows = read(tmp_path / "x.csv")
    assert status == 0 and [row["image"] for row in rows] == changed
    assert out.startswith(f"{len(changed)} of 40 images changed the class of the reference: ")
    for row in rows:
        folder = Path(row["image"]).parent.name
        assert row["class"] == ("" if folder == "strange" else folder)
        assert (row["change"] == "class not known") == (folder == "strange")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert predict("--reference", reference, "--output", "x.jsonl", "--force")[0] == 0
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == changed
    out = predict("--reference", reference)[1]
    assert out.count("\n") == len(changed) + 3 and out.splitlines()[-1].startswith(
        f"{len(changed)} of 40 images"
    )
    assert predict("--reference", old)[:2] == (
        0, "0 of 40 images changed the class of the reference: 0 right to wrong, 0 wrong to right, 0 wrong to other "
        "wrong\n",
    )  # fmt: skip
    (tmp_path / "y.png").touch()
    for options, text in (
        (["--topk", "2"], "--topk: beside a --reference"),
        (["--output", "y.csv"], "y.png exists; --force"),
        (["--output", "x.csv"], "x.csv exists; --force"),
    ):
        status, out, err = predict("--reference", reference, *options)
        assert (status, out, err.count("\n")) == (2, "", 1) and text in err, err
