"""The explorer in a real JupyterLab, started as `make lab` starts it, in a real Chromium: drawn in, typed, moved, looked at.

Screenshots and times stay in runs/browser/. The server works on a copy, with nothing of the user's Jupyter settings.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from bsap_utils import ROOT

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-first-run"]  # fmt: skip
PATIENCE = 180  # seconds, for a machine whose two cores are busy with other tests
PICTURE = ".jp-OutputArea-output .widget-html img"
PHOTO = ROOT / "data/refshapes/images/mscoco/images/train2014/COCO_train2014_000000010002.jpg"
SHOTS = ROOT / "runs/browser"
SETTINGS = {  # no network; every cell in the page, so that no error is out of sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}


def lacking(what):
    """Skip, or fail where the browser test is required, as in continuous integration."""
    (pytest.fail if os.environ.get("BSAP_BROWSER") == "required" else pytest.skip)(what)


def until(found, report):
    """Return what `found` gives once it is true; fail with the report when patience is at its end."""
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        if time.monotonic() > end:
            pytest.fail(f"nothing after {PATIENCE} s: {report()}")
        time.sleep(0.1)
    return value


def copy_notebook(folder):
    """Copy 00 as nobody has run it yet; its last cell tells that all others have run, and in which Python."""
    notebook = nbformat.read(ROOT / "notebooks/00_explore.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += f"\nLIMIT = 40\nOUT_DIR = {str(folder / 'figures')!r}"
    told = f"import sys; from pathlib import Path; _ = Path({str(folder / 'done')!r}).write_text(sys.executable)"
    notebook.cells.append(nbformat.v4.new_code_cell(told))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (folder / "notebooks").mkdir()
    nbformat.write(notebook, folder / "notebooks/00_explore.ipynb")


def lab_command():
    """What `make lab` runs, with the Python of these tests for that of .venv."""
    if not shutil.which("make"):
        lacking("make is not installed")
    shown = subprocess.run(["make", "--no-print-directory", "-n", "-o", ".venv/.ready", "lab"], cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert f"{ROOT}/.venv/" in shown
    return shown.replace(f"{ROOT}/.venv", sys.prefix).rstrip()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A server, with other kernels called python3 around, for a copy of 00: (address, token, folder)."""
    if not CHROMIUM:
        lacking("no Chromium is installed (on Debian: apt install chromium)")
    folder = tmp_path_factory.mktemp("lab")
    copy_notebook(folder)
    other = {"argv": ["false", "{connection_file}"], "display_name": "Another Python", "language": "python"}
    for name in ("user", "elsewhere"):
        (folder / name / "kernels/python3").mkdir(parents=True)
        (folder / name / "kernels/python3/kernel.json").write_text(json.dumps(other))
    for name, settings in SETTINGS.items():
        file = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    places = {"JUPYTER_DATA_DIR": "user", "JUPYTER_PATH": "elsewhere", "JUPYTER_CONFIG_DIR": "config",
              "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
              "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}  # fmt: skip
    environment = os.environ | {name: str(folder / place) for name, place in places.items()}
    environment |= {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "BSAP_CACHE": str(ROOT / "data/cache")}
    (folder / "browser").write_text(f"#!/bin/sh\necho \"$1\" > '{folder}/opened'")
    (folder / "browser").chmod(0o755)
    environment["BROWSER"] = f"'{folder}/browser' %s"  # a user's: it only notes what it is told to open
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = os.urandom(12).hex()
    flags = f" --ServerApp.ip=127.0.0.1 --ServerApp.port={port} --IdentityProvider.token={token} --allow-root"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            "exec " + lab_command() + flags, shell=True, cwd=folder, env=environment, stdout=log, stderr=log
        )
    try:
        info = until(
            lambda: next((folder / "runtime").glob("jpserver-*.json"), None),
            lambda: (folder / "server.log").read_text(),
        )
        yield json.loads(info.read_text())["url"], token, folder
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture(scope="module")
def page(lab):
    """The notebook in the browser, all cells run without an error."""
    from playwright.sync_api import sync_playwright

    address, token, folder = lab
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(f"{address}lab/tree/notebooks/00_explore.ipynb?token={token}&reset")

        def connected():  # before its kernel is there, JupyterLab would ask which one to take
            page.wait_for_timeout(300)
            kernels = page.request.get(f"{address}api/kernels?token={token}").json()
            return any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels)

        until(connected, lambda: "no kernel")
        error = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
        numbered = page.locator(".jp-InputPrompt").get_by_text(re.compile(r"\[(\*|\d+)\]"))

        def finished():
            if not numbered.count():  # a kernel that has only just said that it is idle drops what it is told
                page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
                page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
                page.wait_for_timeout(1000)
            page.wait_for_timeout(100)
            return (folder / "done").exists() or error.count()

        until(finished, lambda: page.locator(".jp-Notebook").inner_text())
        page.screenshot(path=SHOTS / "run.png")
        assert not error.count(), error.first.inner_text()
        assert Path((folder / "done").read_text()).samefile(sys.executable)
        page.locator(PICTURE).evaluate("element => element.scrollIntoView()")
        yield page
        browser.close()


def control(page, kind, label):
    return page.locator(f".{kind}", has=page.locator(".widget-label").get_by_text(label, exact=True))


def changes(page, act):
    """Act, and wait until another picture is shown; how long that took."""
    page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
    before, start = page.locator(PICTURE).get_attribute("src"), time.perf_counter()
    act()
    try:
        page.wait_for_function(f"before => document.querySelector('{PICTURE}').src != before", arg=before, polling=10)
    except Exception:
        page.screenshot(path=SHOTS / "no_change.png")
        raise
    return time.perf_counter() - start


def test_make_lab_opens_the_explorer(lab):
    address, token, folder = lab
    opened = until(
        lambda: (folder / "opened").exists() and (folder / "opened").read_text(), lambda: "no browser was opened"
    )
    assert (
        f"{address}lab/tree/notebooks/00_explore.ipynb?token={token}"
        in Path(opened.strip().removeprefix("file://")).read_text()
    )


def test_a_scene_is_asked_in_words_and_moved_by_sliders(page):
    page.wait_for_timeout(500)  # for the screenshot only: buttons settle
    page.screenshot(path=SHOTS / "scene.png")
    picture, seconds = page.locator(PICTURE), {}
    assert re.fullmatch(r"CLIP picks \d+, BSAP picks \d+", picture.get_attribute("alt"))
    slider = control(page, "widget-slider", "Temperature")
    slider.locator(".noUi-handle").focus()
    seconds["temperature"] = [changes(page, lambda: page.keyboard.press("ArrowRight")) for _ in range(5)]
    assert slider.locator(".widget-readout").inner_text() == "1.78"  # five steps of a twentieth of a decade
    control(page, "widget-slider", "Weight").locator(".noUi-handle").focus()
    seconds["weight"] = [changes(page, lambda: page.keyboard.press("ArrowLeft")) for _ in range(5)]
    typed = control(page, "widget-text", "Expression").locator("input")
    seconds["text"] = [changes(page, lambda text=text: typed.fill(text)) for text in ("orange fish", "red star")]
    focus = control(page, "widget-dropdown", "In focus").locator("select")
    seconds["focus"] = [changes(page, lambda: focus.select_option("NNN"))]
    assert "NNN picks" in picture.get_attribute("alt")
    changes(page, lambda: focus.select_option("BSAP"))
    seconds["next"] = [changes(page, lambda: page.get_by_role("button", name="Next loss").click())]
    page.get_by_text("This setting on all scenes").wait_for()
    page.screenshot(path=SHOTS / "next_loss.png")
    (SHOTS / "seconds.json").write_text(
        json.dumps({name: [round(one, 3) for one in times] for name, times in seconds.items()}) + "\n"
    )


def test_a_picture_of_ones_own_gets_boxes_by_mouse(page, tmp_path):
    page.get_by_role("button", name="a picture of my own").click()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for file, words in ((tmp_path / "broken.png", "cannot be read"), (PHOTO, "Draw boxes")):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Choose a picture").click()
        chooser.value.set_files(file)
        page.get_by_role("alert").get_by_text(words).wait_for()
        page.locator(f'{PICTURE}[style*="opacity: 0.3"]').wait_for()  # it is not the answer to what is asked now
        page.screenshot(path=SHOTS / f"{file.stem}.png")
    canvas = page.locator(".jp-OutputArea-output .image svg").first
    place = canvas.bounding_box()

    def draw(left, top, right, bottom):
        page.mouse.move(place["x"] + left, place["y"] + top)
        page.mouse.down()
        page.wait_for_timeout(200)  # a hand is slower than a program; the widget first makes the box
        page.mouse.move(place["x"] + right, place["y"] + bottom, steps=3)
        page.wait_for_timeout(200)
        page.mouse.up()

    changes(page, lambda: draw(20, 20, 120, 110))
    assert page.locator(PICTURE).get_attribute("alt") == "CLIP picks 1, BSAP picks 1"
    changes(page, lambda: draw(150, 40, 260, 160))
    page.get_by_text("has only ever seen drawn shapes").wait_for()
    page.wait_for_function(
        "/boxes = .*, 1[01]\\d.*, 1[12]\\d.\\d\\]\\]/.test([...document.querySelectorAll('textarea')].map(t => t.value).join())"
    )
    page.screenshot(path=SHOTS / "boxes.png")
    code = control(page, "widget-textarea", "As Python").locator("textarea").input_value()
    changes(page, lambda: page.get_by_role("button", name="Find candidates").click())
    page.screenshot(path=SHOTS / "candidates.png")
    page.get_by_role("button", name="a scene of the data set").click()
    assert f"open_picture('{PHOTO.name}', upright=True)" in code
