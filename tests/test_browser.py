"""The notebooks in a real JupyterLab, started as `make lab` starts it, in a real Chromium: run, moved and looked at.

Screenshots stay in runs/browser/. The server works on copies, with nothing of the user's Jupyter settings.
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
PATIENCE = 240  # seconds, for a machine whose two cores are busy with other tests
PICTURE = ".jp-OutputArea-output .widget-html img"
PHOTO = "data/refshapes/images/mscoco/images/train2014/COCO_train2014_000000010002.jpg"
SHOTS = ROOT / "runs/browser"
OTHER_KERNEL = {"argv": ["false", "{connection_file}"], "display_name": "Another Python", "language": "python"}
SETTINGS = {  # no network; every cell in the page, so that no error is out of sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}


def lacking(what):
    """Skip, or fail where the browser test is required, as in continuous integration."""
    (pytest.fail if os.environ.get("BSAP_BROWSER") == "required" else pytest.skip)(what)


def copy_notebook(stem, folder, **parameters):
    """Copy a notebook with other parameters; its last cell tells that all others have run, and in which Python."""
    notebook = nbformat.read(ROOT / f"notebooks/{stem}.ipynb", as_version=4)
    done = folder / f"{stem}.done"
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    told = f"import sys\n_ = Path({str(done)!r}).write_text(sys.executable)"
    notebook.cells.append(nbformat.v4.new_code_cell(told))
    for cell in notebook.cells:
        if cell.cell_type == "code":  # as nobody has run it yet: what it shows is of this run
            cell.outputs, cell.execution_count = [], None
    (folder / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"notebooks/{stem}.ipynb")
    return done


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
    """A server for copies of both notebooks, with other kernels called python3 around: (address, token, folder)."""
    if not CHROMIUM:
        lacking("no Chromium is installed (on Debian: apt install chromium)")
    folder = tmp_path_factory.mktemp("lab")
    copy_notebook("00_explore", folder, OUT_DIR=str(folder / "figures"))
    copy_notebook("03_rec", folder, OUT_DIR=str(folder / "figures"), LIMIT=12)
    for name in ("user", "elsewhere"):
        (folder / name / "kernels/python3").mkdir(parents=True)
        (folder / name / "kernels/python3/kernel.json").write_text(json.dumps(OTHER_KERNEL))
    for name, settings in SETTINGS.items():
        file = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings))
    own = {"DATA_DIR": "user", "PATH": "elsewhere", "CONFIG_DIR": "config", "RUNTIME_DIR": "runtime"}
    own |= {"LAB_SETTINGS_DIR": "settings", "LAB_WORKSPACES_DIR": "workspaces"}
    own = {f"JUPYTER{'' if name.startswith('LAB') else '_'}{name}": str(folder / place) for name, place in own.items()}
    environment = os.environ | own | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}  # the Makefile exports the latter
    (folder / "browser").write_text(
        f"#!/bin/sh\necho \"$1\" > '{folder}/opened.part'\nmv '{folder}/opened.part' '{folder}/opened'"
    )
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


def until(found, report):
    """Return what `found` gives once it is true; fail with the report when patience is at its end."""
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        if time.monotonic() > end:
            pytest.fail(f"nothing after {PATIENCE} s: {report()}")
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        lacking("no Chromium is installed (on Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def run_all(lab, browser):
    """Open a notebook, run all cells by the menu, and return (page, the notebook as saved), once it is done without an error."""
    address, token, folder = lab
    SHOTS.mkdir(parents=True, exist_ok=True)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE * 1000)

    def run(stem):
        page.goto(f"{address}lab/tree/notebooks/{stem}.ipynb?token={token}&reset")
        idle = page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')

        def connected():  # before its kernel is there, JupyterLab would ask which one to take
            page.wait_for_timeout(500)
            kernels = page.request.get(f"{address}api/kernels?token={token}").json()
            return any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels)

        until(connected, lambda: "no kernel")
        error = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
        numbered = page.locator(".jp-InputPrompt").get_by_text(re.compile(r"\[(\*|\d+)\]"))
        done = folder / f"{stem}.done"

        def finished():
            if (
                not numbered.count()
            ):  # a kernel that has only just said that it is idle drops what it is told; say it again
                page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
                page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
                page.wait_for_timeout(2000)
            page.wait_for_timeout(100)
            return (done.exists() and done.read_text()) or error.count()

        try:
            until(finished, lambda: page.locator(".jp-Notebook").inner_text())
            idle.wait_for()
        finally:
            page.screenshot(path=SHOTS / f"{stem}.png")
        assert not error.count(), error.first.inner_text()
        assert Path(done.read_text()).samefile(sys.executable)
        page.keyboard.press("Control+s")

        def saved():
            page.wait_for_timeout(100)
            try:
                notebook = nbformat.read(folder / f"notebooks/{stem}.ipynb", as_version=4)
            except nbformat.reader.NotJSONError:  # it is being written
                return None
            code = [cell for cell in notebook.cells if cell.cell_type == "code"]
            return notebook if all(cell.execution_count for cell in code) else None

        notebook = until(saved, lambda: "the notebook was not saved as run")
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
        return page, outputs

    yield run
    page.close()


def test_make_lab_opens_the_explorer(lab):
    address, token, folder = lab
    opened = until(
        lambda: (folder / "opened").exists() and (folder / "opened").read_text(), lambda: "no browser was opened"
    )
    page = Path(opened.strip().removeprefix("file://")).read_text()
    assert f"{address}lab/tree/notebooks/00_explore.ipynb?token={token}" in page


def test_rec_runs_and_shows_its_figures(run_all, lab):
    page, outputs = run_all("03_rec")
    page.locator(".jp-RenderedImage img").nth(1).scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / "03_rec_figures.png")
    saved = {path.name for path in (lab[2] / "figures").glob("fig_*.png")} - {"fig_explore.png"}
    assert "fig_rec.png" in saved and sum("image/png" in output.get("data", {}) for output in outputs) == len(saved)


def test_the_explorer_answers_each_change_at_once(run_all, tmp_path):
    page, outputs = run_all("00_explore")
    assert any(
        {"application/vnd.jupyter.widget-view+json", "image/png"} <= set(output.get("data", {})) for output in outputs
    )
    picture = page.locator(PICTURE)
    page.locator(".widget-toggle-buttons").evaluate("element => element.scrollIntoView()")
    page.screenshot(path=SHOTS / "00_explore.png")
    assert "BSAP picks region" in picture.get_attribute("alt")

    def control(kind, label):
        return page.locator(f".{kind}", has=page.locator(".widget-label").get_by_text(label, exact=True))

    def changes(act):
        """Act, and wait until the picture has changed; how long that took."""
        before, start = picture.get_attribute("src"), time.perf_counter()
        act()
        page.wait_for_function(f"before => document.querySelector('{PICTURE}').src != before", arg=before, polling=10)
        return time.perf_counter() - start

    temperature = control("widget-slider", "Temperature")
    temperature.locator(".noUi-handle").focus()
    seconds = [changes(lambda: page.keyboard.press("ArrowRight")) for _ in range(5)]
    assert temperature.locator(".widget-readout").inner_text() == "1.78"  # five steps of a twentieth of a decade
    (SHOTS / "changes.json").write_text(
        json.dumps({"seconds from the key to the picture": [round(s, 3) for s in seconds]})
    )
    changes(lambda: control("widget-text", "Expression").locator("input").fill("orange fish"))
    assert "is not known" in picture.get_attribute("alt")
    changes(lambda: control("widget-dropdown", "Known expressions").locator("select").select_option(index=1))
    assert "which is" in picture.get_attribute("alt")
    changes(lambda: control("widget-dropdown", "Method").locator("select").select_option("NNN"))
    assert "NNN picks region" in picture.get_attribute("alt")
    assert temperature.locator("[disabled]").count()
    page.screenshot(path=SHOTS / "00_explore_changed.png")

    page.get_by_role("button", name="a picture of my own").click()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for file, said in ((tmp_path / "broken.png", "no picture that can be read"), (ROOT / PHOTO, "")):
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Choose a picture").click()
        chooser.value.set_files(file)
        if said:
            page.get_by_role("alert").get_by_text(said).wait_for()
            page.locator(f'{PICTURE}[style*="opacity: 0.3"]').wait_for()  # it is not the answer to what is asked now
            page.screenshot(path=SHOTS / "00_explore_wrong.png")
    page.get_by_role("alert").wait_for(state="detached")
    boxes = control("widget-textarea", "Boxes").locator("textarea")
    boxes.fill("10, 10, 100, 100\n60, 20, 200, a")
    boxes.blur()
    page.get_by_role("alert").get_by_text("Line 2 of the boxes").wait_for()
    boxes.fill("10, 10, 100, 100\n60, 20, 200, 190")
    changes(boxes.blur)
    page.screenshot(path=SHOTS / "00_explore_own.png")
