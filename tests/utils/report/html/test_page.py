"""The page about runs: what it shows is what the runs have left, and what is damaged is said in one line."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import main
import tools
from tests.main.runs import done_in
from utils.config.resolve import read as read_config
from utils.errors import UserError
from utils.report import run_files
from utils.report.epoch_files import MetricsFile, RecordsFile
from utils.report.html import page
from utils.report.verified import Comparison, Verified

TINY = "--dataset fake --width_alpha 0.125 --input_size 16 -b 8 --fake_size 32 --epochs 2"
LINES = {
    "full": f"{TINY} --keyword cifar10,cbas,origin",
    "two": f"{TINY} --keyword cifar10,cbas,origin,dorefa,lsq --fm_enable --wt_enable --fm_bit 2 --wt_bit 2 --re_init",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with two finished runs: in full precision, and with two bits."""
    folder = done_in(
        tmp_path_factory.mktemp("runs"), *(f"{line} --case {case}" for case, line in LINES.items())
    )
    return folder / "exp"


@pytest.fixture
def two(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run with two bits, to be changed."""
    return shutil.copytree(finished / "two", tmp_path / "two")


def data_of(text: str) -> dict[str, Any]:
    """What the page's script draws from."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def cells(text: str, section: str) -> list[list[str]]:
    """The rows of the tables of a section, as text."""
    found = re.search(rf'<section id="{section}">(.*?)</section>', text, re.DOTALL)
    assert found is not None
    rows = re.findall(r"<tr[ >].*?</tr>", found[1].partition("<tbody>")[2], re.DOTALL)
    return [
        [
            html.unescape(re.sub("<[^>]*>", "", cell)).strip()
            for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", row, re.DOTALL)
        ]
        for row in rows
    ]


def test_the_page_is_whole(finished: Path) -> None:
    """Every section, every run and every figure, and nothing from elsewhere."""
    text = page.render(run_files.read([finished / "full", finished / "two"]))
    for section in ("overview", "curves", "quantizers", "levels", "epochs", "cost", "audit", "configuration"):
        assert text.count(f'<section id="{section}">') == 1
        assert f'href="#{section}"' in text
    assert set(re.findall(r'data-figure="(\w+)"', text)) == data_of(text)["figures"].keys()
    own = text.replace(str(page.get_plotlyjs()), "")
    assert not re.search(r'(src|href)="(?!#|data:)', own)
    assert "http" not in own and "@import" not in own and "url(" not in own


def test_curves_are_the_metrics(finished: Path) -> None:
    rows = MetricsFile.read(finished / "two" / "metrics.csv")
    figures = data_of(page.render(run_files.read([finished / "full", finished / "two"])))["figures"]
    (loss, top1, rate) = (figures[f"curve{i}"]["data"] for i in range(3))
    validation, training = loss[2:]
    assert validation["y"] == [row["val_loss"] for row in rows]
    assert training["y"] == [row["train_loss"] for row in rows]
    assert (validation["legendgroup"], training["legendgroup"]) == ("two", "two")
    assert [trace["showlegend"] for trace in loss] == [True, False, True, False]
    assert [trace["y"] for trace in top1[2:]] == [
        [row[c] for row in rows] for c in ("val_top1", "train_top1")
    ]
    assert rate[1]["y"] == [row["lr"] for row in rows]


def test_the_overview_is_the_summary(finished: Path) -> None:
    folders = [finished / "full", finished / "two"]
    full, two = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    first, second = cells(page.render(run_files.read(folders)), "overview")
    assert first[:4] == ["full", "2 epochs", "resnet20", "32/32"]
    assert second[:4] == ["two", "2 epochs", "resnet20", "2/2"]
    gap = two["last_top1"] - full["last_top1"]
    assert (first[4], first[5]) == (f"{full['last_top1']:.2f}", "")
    assert (second[4], second[5], second[6]) == (
        f"{two['last_top1']:.2f}", f"{gap:+.2f}", f"{two['best_top1']:.2f}",
    )  # fmt: skip
    assert second[7:9] == [
        f"{two['weight_bytes'] / 1024:.1f}",
        f"{two['float_weight_bytes'] / two['weight_bytes']:.1f}x",
    ]
    assert (first[10], second[10]) == ("\N{EN DASH}", "passed")


def test_quantizers_are_the_last_record(finished: Path) -> None:
    records = RecordsFile.read(finished / "two" / "quantizers.jsonl")
    text = page.render(run_files.read([finished / "two"]))
    rows = cells(text, "quantizers")
    assert len(rows) == len(records[-1]["quantizers"]) == 40
    for row, shown in zip(records[-1]["quantizers"], rows, strict=True):
        assert shown[:5] == [
            row["name"], {"fm": "activation", "wt": "weight"}[row["tag"]], "lsq", "4", str(row["used"]),
        ]  # fmt: skip
        assert (shown[5], shown[6]) == (f"{100 * row['clipped']:.1f}", f"{row['range']:.4g}")
        assert shown[7] == ("" if row["tag"] == "fm" else f"{100 * row['changed']:.1f}")
    (run,) = data_of(text)["runs"]
    name = records[0]["quantizers"][5]["name"]
    assert run["shown"] == [1, 2]
    assert run["series"][name]["range"] == [record["quantizers"][5]["range"] for record in records]
    histogram = run["histograms"][1][name]
    assert histogram["counts"] == records[1]["quantizers"][5]["histogram"]["counts"]
    assert histogram["positions"] == records[1]["quantizers"][5]["positions"]


def test_cost_and_audit_are_the_summary(finished: Path) -> None:
    summary = json.loads((finished / "two" / "summary.json").read_text())
    text = page.render(run_files.read([finished / "two"]))
    *layers, total = cells(text, "cost")
    assert [row[0] for row in layers] == [layer["name"] for layer in summary["layers"]]
    assert layers[1][4:6] == ["2", "2"] and layers[0][4:6] == ["32", "32"]
    assert total[6:] == [
        f"{summary['weight_bytes'] / 1024:.2f}",
        f"{summary['macs']:,}",
        f"{summary['bit_operations']:,}",
    ]
    assert sum(layer["bit_operations"] for layer in summary["layers"]) == summary["bit_operations"]
    assert [row[:3] for row in cells(text, "audit")] == [
        [row["name"], str(row["seen"]), str(row["allowed"])] for row in summary["quantizers"]
    ]


def test_configurations_and_what_differs(finished: Path) -> None:
    """Every field of the configuration, and no other; those that differ are marked."""
    read = run_files.read([finished / "full", finished / "two"])
    fields = page._fields(read)
    names = {field["name"] for field in fields}
    assert {"model.quant.fm.levels", "optim.lr", "run.case", "keywords"} <= names
    assert not any(name.startswith("origins") for name in names)
    differing = {field["name"]: field["values"] for field in fields if field["differs"]}
    assert differing["model.quant.wt.method"] == ["none", "lsq"]
    assert differing["run.case"] == ["full", "two"]
    assert "optim.lr" not in differing
    assert read[1].config["optim.lr"] == json.dumps(read_config(LINES["two"].split()).optim.lr)
    assert sum(len(field["values"]) for field in fields) == 2 * len(fields)


def test_a_run_that_goes_on(two: Path) -> None:
    """Without a summary, or with that of an earlier end, it is shown as far as it is."""
    summary = two / "summary.json"
    text = summary.read_text()
    summary.unlink()
    (run,) = run_files.read([two])
    assert run.summary is None and run.done == run.planned == 2
    page_text = page.render([run])
    assert "unfinished, 2 of 2 epochs" in page_text and "Written when a run ends" in page_text
    summary.write_text(text)
    metrics = MetricsFile(two / "metrics.csv", main.METRICS)
    metrics.append({**MetricsFile.read(metrics.path)[-1], "epoch": 3})
    assert run_files.read([two])[0].summary is None
    (two / "metrics.csv").unlink()
    (two / "quantizers.jsonl").unlink()
    summary.unlink()
    text = page.render(run_files.read([two]))
    assert "unfinished, 0 of 2 epochs" in text and "NaN" not in json.dumps(data_of(text))


def test_long_runs_show_some_histograms(two: Path) -> None:
    """The first and the last epoch and some between; the figures of all."""
    record = RecordsFile.read(two / "quantizers.jsonl")[0]
    lines = [json.dumps({**record, "epoch": epoch}) for epoch in range(1, 91)]
    (two / "quantizers.jsonl").write_text("\n".join(lines) + "\n")
    (run,) = data_of(page.render(run_files.read([two])))["runs"]
    assert len(run["shown"]) == page.SHOWN_EPOCHS == len(set(run["shown"]))
    assert (run["shown"][0], run["shown"][-1]) == (1, 90)
    assert all(len(one["range"]) == 90 for one in run["series"].values())


def test_values_that_are_not_finite(two: Path) -> None:
    """They are gaps; the page's data stay JSON."""
    metrics = MetricsFile(two / "metrics.csv", main.METRICS)
    metrics.append({"epoch": 3, "train_loss": math.inf, "lr": 0.1})
    text = page.render(run_files.read([two]))
    (_, training) = data_of(text)["figures"]["curve0"]["data"]
    assert training["y"][-1] is None


def test_names_from_files_are_text(two: Path) -> None:
    """Wherever something from a file is shown, it is shown and not executed."""
    evil = "</script><img src=x onerror=alert(1)>"
    for path in (two / "summary.json", two / "quantizers.jsonl", two / "config.yaml"):
        text = path.read_text()
        text = text.replace("layer1.0.conv1.0", evil).replace("resnet20", evil).replace("lsq", evil)
        path.write_text(text.replace('"audit": "passed', f'"audit": "{evil}'))
    folder = two.rename(two.with_name("<img src=x onerror=alert(2)>"))
    text = page.render(run_files.read([folder, shutil.copytree(folder, folder.with_name("b"))]))
    assert "<img" not in text.replace(str(page.get_plotlyjs()), "")
    assert text.count("</script>") == 3 + str(page.get_plotlyjs()).count("</script>")
    data = data_of(text)
    assert any(evil in name for name in data["runs"][0]["series"])
    assert data["figures"]["curve0"]["data"][0]["name"] == "&lt;img src=x onerror=alert(2)&gt;"


def test_twenty_runs_have_colours_of_their_own(finished: Path, tmp_path: Path) -> None:
    """In every figure; no two are close, and all are seen on the page's light and dark backgrounds.

    Distances are in Oklab (Ottosson, 2020), where 0.02 can just be told apart; contrasts are those of WCAG 2.
    """
    folders = [shutil.copytree(finished / "full", tmp_path / f"run{i}") for i in range(20)]
    data = data_of(page.render(run_files.read(folders)))
    for figure in ("curve0", "size", "operations"):
        traces = {trace["name"]: trace for trace in data["figures"][figure]["data"]}.values()
        colours = {trace.get("line", trace.get("marker"))["color"] for trace in traces}
        assert len(colours) == 20, figure
    assert {run["colour"] for run in data["runs"]} == colours
    linear = {colour: _linear(colour) for colour in colours}
    oklab = [_OKLAB @ np.cbrt(_CONES @ rgb) for rgb in linear.values()]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(oklab, 2)) > 0.12
    white, dark, *luminances = (
        rgb @ [0.2126, 0.7152, 0.0722] + 0.05
        for rgb in (_linear("#ffffff"), _linear("#1b1f24"), *linear.values())
    )
    assert all(white / luminance > 1.8 and luminance / dark > 2 for luminance in luminances)


def _linear(colour: str) -> np.ndarray:
    """Linear red, green and blue, 0 to 1, of an sRGB colour `#rrggbb`."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def test_evaluations_are_left_out(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They leave a folder with a log alone; weights without a size are no ratio."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "log.txt").write_text("top-1 99.50\n")
    full = shutil.copytree(finished / "full", tmp_path / "full")
    change_summary(weight_bytes=0)(full)
    output = tmp_path / "page.html"
    arguments = ["--keyword", "report", str(tmp_path / "eval"), str(full), "--output", str(output)]
    assert tools.main(arguments) == 0
    assert f"left out, nothing was trained there: {tmp_path / 'eval'}\n" == capsys.readouterr().err
    (row,) = cells(output.read_text(encoding="utf-8"), "overview")
    assert row[0] == "full" and row[7:9] == ["0.0", ""]


def test_runs_of_one_name_are_told_apart(finished: Path, two: Path) -> None:
    assert [run.label for run in run_files.read([two, finished / "two"])] == [str(two), str(finished / "two")]
    assert [run.label for run in run_files.read([two, finished / "full"])] == ["two", "full"]
    with pytest.raises(UserError, match="is named twice"):
        run_files.read([two, two / ".." / "two"])


def damage(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def change_summary(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def change_quantizer(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "quantizers.jsonl"
        records = RecordsFile.read(path)
        records[-1]["quantizers"][3] |= changes
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (
        shutil.rmtree,
        "config.yaml: No such file or directory; name the folders of runs, such as exp/CASE",
    ),
    "no configuration": (lambda folder: (folder / "config.yaml").unlink(), "config.yaml: No such file"),
    "a list": (damage("config.yaml", "- 1\n"), "config.yaml is not the configuration of a run"),
    "no YAML": (damage("config.yaml", "a: [\n"), "config.yaml is damaged"),
    "bytes": (lambda folder: (folder / "config.yaml").write_bytes(b"\xff\xfe\x00"), "config.yaml is damaged"),
    "no epochs": (
        damage("config.yaml", "schedule: {epochs: many}\n"),
        "config.yaml is not the configuration",
    ),
    "odd metrics": (damage("metrics.csv", "epoch,lr\n1,fast\n"), "metrics.csv is not a metrics file"),
    "metrics without epochs": (
        damage("metrics.csv", "lr\n1\n"),
        "metrics.csv is not a metrics file: its column epoch",
    ),
    "epochs that are none": (
        damage("metrics.csv", "epoch,lr\nnan,1\n"),
        "metrics.csv is not a metrics file: its column",
    ),
    "no JSON": (damage("summary.json", "{"), "summary.json is damaged"),
    "no summary": (
        damage("summary.json", "[]"),
        "summary.json is damaged: it has '[]' where an entry should be",
    ),
    "no bits": (
        change_summary(bits=None),
        "summary.json is damaged: bits is missing or not what it should be",
    ),
    "no layers": (
        change_summary(layers=None),
        "summary.json has no list of layers: train the run again, or leave",
    ),
    "odd layers": (change_summary(layers=[1]), "summary.json is damaged: it has '1' where"),
    "odd audit": (change_summary(quantizers=[{"name": "x"}]), "summary.json is damaged: allowed is missing"),
    "no records": (damage("quantizers.jsonl", "what\n"), "quantizers.jsonl is damaged: its line 'what'"),
    "no quantizers": (
        damage("quantizers.jsonl", '{"epoch": 1}\n'),
        "quantizers.jsonl has no list of quantizers",
    ),
    "odd quantizer": (change_quantizer(tag=7), "quantizers.jsonl is damaged: tag is missing or not what"),
    "odd histogram": (
        change_quantizer(histogram={"edges": 1, "counts": []}),
        "quantizers.jsonl is damaged: edges is",
    ),
    "odd edges": (
        change_quantizer(histogram={"edges": ["a", 1], "counts": [1]}),
        "quantizers.jsonl is damaged: edges",
    ),
    "odd range": (change_quantizer(range=math.inf), "quantizers.jsonl is damaged: range"),
    "huge range": (change_quantizer(range=10**400), "quantizers.jsonl is damaged: range"),
    "odd levels": (change_quantizer(positions=["a"]), "quantizers.jsonl is damaged: positions"),
}


@pytest.mark.parametrize(("hurt", "message"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_said_in_one_line(
    two: Path, capsys: pytest.CaptureFixture[str], hurt: Callable[[Path], object], message: str
) -> None:
    hurt(two)
    output = two.parent / "page.html"
    assert tools.main(["--keyword", "report", str(two), "--output", str(output)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("tools.py: error: ") and message in err
    assert not output.exists()


def test_the_command(
    finished: Path, two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one run the page lies beside its files, of several where one stands; nothing is written over silently."""
    monkeypatch.chdir(two.parent)
    assert tools.main(["--keyword", "report", "two"]) == 0
    assert re.fullmatch(r"two/report\.html: 1 run, \d\.\d MiB\n", capsys.readouterr().out)
    assert tools.main(["--keyword", "report", "two"]) == 2
    assert "two/report.html exists; --force writes over it" in capsys.readouterr().err
    assert tools.main(["--keyword", "report", "two", "--force"]) == 0
    assert tools.main(["--keyword", "report", "two", str(finished / "full")]) == 0
    assert "report.html: 2 runs" in capsys.readouterr().out
    assert (two.parent / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert tools.main(["--keyword", "report", "two", "--output", "o.pdf"]) == 2
    assert "--output o.pdf: the report is a page, write o.html" in capsys.readouterr().err
    assert not (two.parent / "o.pdf").exists()
    for wrong in ("two", "nowhere/page.html"):
        assert tools.main(["--keyword", "report", "two", "--output", wrong]) == 2
        assert f"--output {wrong}: name a file in a folder that exists" in capsys.readouterr().err


def test_classes_are_those_of_the_evaluation(
    finished: Path, two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`-e` writes accuracy, precision and the confusion matrix; the page shows them with images of the cells."""
    monkeypatch.chdir(two.parent)
    checkpoint = finished.parent / "weights" / "resnet20" / "two-checkpoint.pth.tar"
    line = f"-e --case two --log_dir . --pretrained {checkpoint}"
    assert "classes" not in page.render(run_files.read([two])).split("<nav", 1)[1].split("</nav>")[0]
    assert main.main(line.split()) == 0
    top1 = float(capsys.readouterr().out.rpartition("top-1 ")[2].partition(",")[0])
    (run,) = run_files.read([two])
    assert run.confusion is not None
    matrix = np.array(run.confusion.matrix)
    assert matrix.sum() == 8 and run.confusion.classes == list("0123456789")
    assert top1 == pytest.approx(100 * np.trace(matrix) / 8, abs=0.01)
    for i, row in enumerate(run.confusion.rows):
        images, called = matrix[i].sum(), matrix[:, i].sum()
        assert row["class"] == str(i) and row["images"] == images
        assert row["accuracy"] == (pytest.approx(100 * matrix[i, i] / images, abs=0.01) if images else None)
        assert row["precision"] == (pytest.approx(100 * matrix[i, i] / called, abs=0.01) if called else None)
    counts = {name: len(cell) for name, cell in run.confusion.examples.items()}
    assert counts == {f"{i},{j}": min(matrix[i, j], 3) for i, j in zip(*matrix.nonzero(), strict=True)}
    text = page.render(run_files.read([finished / "full", two]))
    (heat,) = data_of(text)["figures"]["confusion0"]["data"]
    assert heat["text"] == matrix.tolist() and data_of(text)["examples"] == [run.confusion.examples]
    assert [line[:2] for line in cells(text, "classes")] == [
        [str(i), str(matrix[i].sum())] for i in range(10)
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("confusion.csv", "class,a,b\na,1,x\nb,2,3\n"),
        ("confusion.csv", "class,a\na,1\nb,2\n"),
        ("classes.csv", "class,images\na,1\nb,1\n"),
        ("examples.json", '{"0,0": ["<script>"]}'),
        ("examples.json", '{"7,0": []}'),
        ("examples.json", "[]"),
        ("calibration.csv", "low,high,images,accuracy,confidence\n0.1,0.2,0,nan,nan\n"),
        ("pictures.json", '{"mistakes": [{"image": "a.png"}]}'),
        ("pictures.json", '{"mistakes": [{"image": "x", "title": "", "caption": "", "picture": "<b>"}]}'),
        ("pictures.json", "[]"),
    ],
)
def test_damaged_files_of_an_evaluation(two: Path, name: str, text: str) -> None:
    files = {
        "confusion.csv": "class,a,b\na,1,1\nb,2,3\n",
        "classes.csv": "class,images,accuracy,precision\na,2,50.0,\nb,5,,1\n",
    }
    for known, content in files.items():
        (two / known).write_text(content)
    assert page.render(run_files.read([two]))
    (two / name).write_text(text)
    with pytest.raises(UserError, match=r"two: confusion.csv, classes.csv, .* is damaged: evaluate"):
        run_files.read([two])


COMPARED = Comparison(
    file="photos & co/page/network.onnx", engine="onnxruntime, default", bits="2/2", images=360, codes={"a": 0.25},
    optimiser={}, logits=None, same=0.99, top1=98.0, reference=99.0, bytes=2048, integer=3, layers=4,
    milliseconds=1.5, float_milliseconds=2.5, threads=1, faults=("top-1 is <b>lower",),
)  # fmt: skip


def test_exported_files_are_those_of_the_last_verification(two: Path) -> None:
    assert "Exported" not in page.render(run_files.read([two]))
    record = Verified(checkpoint="two.pth.tar", cpu="a CPU", comparisons=(COMPARED,))
    (two / "verified.json").write_text(record.as_json())
    (run,) = run_files.read([two])
    assert run.verified == record
    text = page.render([run])
    (row,) = cells(text, "exported")
    assert row == [
        "page/network.onnx", "onnxruntime, default", "2/2", "25.000 %", "-", "99.00 %", "98.00", "2.0", "3 of 4",
        "1.50", "2.50",
    ]  # fmt: skip
    section = text.split('<section id="exported">')[1].split("</section>")[0]
    assert all(
        part in section
        for part in ("1 fault<", "beside two.pth.tar", "top-1 is &lt;b&gt;lower", "not in a browser", "a CPU")
    )
    for line in record.as_text().splitlines()[2:]:
        assert html.unescape(line.partition("  ")[0]) in html.unescape(section)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"checkpoint": "x", "cpu": "y", "comparisons": []}',
        '{"checkpoint": "x", "cpu": "y", "comparisons": [3]}',
    ],
)
def test_a_damaged_record_of_exported_files(two: Path, text: str) -> None:
    (two / "verified.json").write_text(text)
    with pytest.raises(UserError, match=r"verified.json is damaged: verify again, or remove it"):
        run_files.read([two])


@pytest.mark.parametrize(
    ("name", "value"),
    [("top1", float("nan")), ("bytes", "2"), ("codes", {"a": "b"}), ("faults", [1]), ("more", 1)],
)
def test_damaged_entries_of_exported_files(two: Path, name: str, value: object) -> None:
    record = json.loads(Verified(checkpoint="x", cpu="y", comparisons=(COMPARED,)).as_json())
    record["comparisons"][0][name] = value
    (two / "verified.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"verified.json is damaged"):
        run_files.read([two])
