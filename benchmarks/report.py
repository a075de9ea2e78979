"""Train digits in full precision, at 2 and at 4 bits, write the page about the three runs and take its picture.

    python benchmarks/report.py    # exp/report.html and docs/images/report.png

The picture needs chromium, chromium-driver and the package selenium. Finished runs are not trained again,
except with `--fresh`.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "report.png"
TUNE = "config/config.lsq.finetune.digits.2bit.resnet20"
RUNS = {  # case -> arguments of train.sh
    "digits-fp-resnet20": ("config/config.dorefa.train-scratch.digits.fp.resnet20",),
    "digits-lsq-2bit-resnet20": (TUNE,),
    "digits-lsq-4bit-resnet20": (
        TUNE,
        *["--fm_bit", "4", "--wt_bit", "4", "--case", "digits-lsq-4bit-resnet20"],
    ),
}
WIDTH = 1280  # pixels of the window
PARTS = (("overview", "curves"), ("levels", "epochs"))  # first and last section of each part of the picture
MARGIN = 18  # pixels around them
COLOURS = 128  # of the picture; enough for lines and letters


def picture(page: Path) -> Image.Image:
    """The `PARTS` of the page, one below the other."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        for option in (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
            "--hide-scrollbars", f"--user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(option)
        options.binary_location = shutil.which("chromium") or ""
        browser = webdriver.Chrome(options, Service(shutil.which("chromedriver") or ""))
        try:
            window = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
            browser.get(page.resolve().as_uri())
            window["height"] = browser.execute_script("return document.documentElement.scrollHeight")
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", window)
            whole = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
            script = "const box = document.getElementById(arguments[0]).getBoundingClientRect(); "
            script += "return [box.top, box.bottom]"
            edges = [[browser.execute_script(script, name) for name in names] for names in PARTS]
        finally:
            browser.quit()
    bands = [
        whole.crop((0, round(first[0]) - MARGIN, WIDTH, round(last[1]) + MARGIN)) for first, last in edges
    ]
    sheet = Image.new("RGB", (WIDTH, sum(band.height for band in bands)))
    top = 0
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height
    return sheet


def main() -> int:
    """Train runs that are missing, write the page and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fresh", action="store_true", help="train all runs, also those that have ended")
    fresh = parser.parse_args().fresh
    os.chdir(ROOT)
    folders = [Path("exp", case) for case in RUNS]
    for folder, arguments in zip(folders, RUNS.values(), strict=True):
        if fresh or not (folder / "summary.json").exists():
            subprocess.run(["bash", "train.sh", *arguments], check=True)
    page = Path("exp", "report.html")
    tool = [
        sys.executable,
        "tools.py",
        "--keyword",
        "report",
        *map(str, folders),
        "--output",
        str(page),
        "--force",
    ]
    subprocess.run(tool, check=True)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    picture(page).quantize(COLOURS).save(PICTURE, optimize=True)
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
