"""`bsap data get` and `check` against a real server of this machine that has the published layout, and real faults."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

from bsap_utils import ROOT, download
from bsap_utils.cli import app
from bsap_utils.datasets import DatasetError, load_refer

SAMPLE = ROOT / "data/refshapes"
PICTURES = "images/mscoco/images/train2014"
PER_SPLIT = {"val": 12, "testA": 3, "testB": 2}


class Mirror(ThreadingHTTPServer):
    """Serves `files`; `faults[path]` lists what to do instead, one a GET, the last for ever: a status, "cut", "short",
    or bytes."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.log: list[str] = []
        self.delay = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of these tests."""

    def pictures_sent(self) -> list[str]:
        return [path for path in self.log if path.endswith(".jpg")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Mirror

    def do_GET(self) -> None:
        self.server.log.append(self.path)
        time.sleep(self.server.delay if self.path.endswith(".jpg") else 0)
        body, todo = self.server.files.get(self.path), self.server.faults.get(self.path) or [None]
        fault = todo.pop(0) if len(todo) > 1 else todo[0]
        fault = 404 if body is None else fault
        if isinstance(fault, int) and fault != 200:
            self.send_error(fault)
            return
        body = fault if isinstance(fault, bytes) else body
        sent = body[: len(body) // 2] if fault in ("cut", "short") else body
        self.send_response(200)
        self.send_header("Content-Length", str(len(sent if fault == "short" else body)))
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = fault == "cut"

    def log_message(self, *_: object) -> None:
        pass


def make_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def make_tar(members: dict[str, bytes], change=lambda info: info) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info = change(info)
            archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def published() -> dict[str, bytes]:
    """What the mirror serves: scenes of the sample as refcoco and as refcoco+, of its test split as testA and testB."""
    content = json.loads((SAMPLE / "refshapes/instances.json").read_bytes())
    refs = pickle.loads((SAMPLE / "refshapes/refs(unc).p").read_bytes())
    ids = {s: sorted({r["image_id"] for r in refs if r["split"] == s}) for s in ("val", "test")}
    split = dict.fromkeys(ids["val"][:12], "val") | dict.fromkeys(ids["test"][:3], "testA")
    split |= dict.fromkeys(ids["test"][3:5], "testB")
    for key in ("images", "annotations"):
        content[key] = [entry for entry in content[key] if entry["id" if key == "images" else "image_id"] in split]
    refs = [ref | {"split": split[ref["image_id"]]} for ref in refs if ref["image_id"] in split]
    boxes = json.loads((SAMPLE / "refshapes_dets_dict.json").read_bytes())
    boxes = json.dumps({key: value for key, value in boxes.items() if int(key) in split}).encode()
    members = {"instances.json": json.dumps(content).encode(), "refs(unc).p": pickle.dumps(refs, 0)}
    names = [image["file_name"] for image in content["images"]]
    files = {f"/train2014/{name}": (SAMPLE / PICTURES / name).read_bytes() for name in names}
    for name in ("refcoco", "refcoco+"):
        # the published archives hold other things as well, of macOS among them
        own = {f"{name}/{key}": value for key, value in members.items()}
        files[f"/{name}.zip"] = make_zip(own | {f"__MACOSX/{name}/._refs(unc).p": b"\0", f"{name}/refs(google).p": b""})
    dets = {f"reclip_data/{name}_dets_dict.json": boxes for name in ("refcoco", "refcoco+", "refcocog")}
    files["/reclip_data.tar.gz"] = make_tar({"reclip_data/refcoco_val.jsonl": b"{}\n"} | dets)
    return files


@pytest.fixture
def mirror(published, monkeypatch):
    monkeypatch.setattr(download, "BACK_OFF", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("BSAP_BASE_URL", raising=False)
    server = Mirror()
    server.files = dict(published)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def got_once(published, tmp_path_factory):
    server, root = Mirror(), tmp_path_factory.mktemp("once")
    server.files = published
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        assert download.get("refcoco", ["val"], root, server.url) == []
    server.server_close()
    return root


@pytest.fixture
def got(got_once, tmp_path):
    """A root with refcoco val complete."""
    return Path(shutil.copytree(got_once, tmp_path / "got"))


def bsap(*args: object) -> SimpleNamespace:
    result = CliRunner().invoke(app, ["data", *map(str, args)])
    # the runner prints the message of sys.exit to stdout; a shell has it on stderr
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr + result.stdout)


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if ".part-" in path.name]


def pictures(root: Path) -> list[Path]:
    return sorted((root / PICTURES).glob("*.jpg"))


def test_first_fetch_has_only_what_the_split_needs_in_the_layout_of_the_loader(mirror, tmp_path):
    result = bsap("get", "refcoco", "--split", "val", "--root", tmp_path, "--base-url", mirror.url + "/")
    assert result.code == 0, result.err
    assert len(mirror.log) == 2 + PER_SPLIT["val"] and len(set(mirror.log)) == len(mirror.log)
    val = load_refer(tmp_path, "refcoco").select(split="val")
    assert len(val.images) == PER_SPLIT["val"] == len(pictures(tmp_path)) and not val.missing_images()
    assert {val.load_image(image_id).size for image_id in val.images.index} == {(320, 240)}
    assert {path.name for path in tmp_path.glob("*.json")} == {f"refcoco{x}_dets_dict.json" for x in ("", "+", "g")}
    assert not leftovers(tmp_path) and not list(tmp_path.rglob("._*"))
    # it says before it starts how many files and bytes, what is an estimate, and shows a bar with rate and time left
    assert re.search(r"about 1,500 pictures of 2\d\dMB \(an estimate\)", result.out.replace("\n ", ""))
    assert "12, 0 of them there (0 newly linked); to get: 12, about 1.98MB (an estimate)" in result.out
    assert re.search(r"refcoco\.zip: \d\S+B, from http", result.out)
    assert re.search(r"pictures: 100%.*12/12 \[\d\d:\d\d<\d\d:\d\d,.*pictures/s\]", result.err)
    # and the record is one that sha256sum reads
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count(": OK") == 3 + 3 + 12, checked
    assert "pictures" not in checked.stdout and "# refcoco val\n" in (tmp_path / "SHA256SUMS").read_text()


def test_what_is_there_is_not_fetched_again(mirror, got, capsys):
    assert download.get("refcoco", ["val", "testA"], got, mirror.url) == []
    assert sorted(mirror.log) == sorted(mirror.pictures_sent()) and len(mirror.log) == PER_SPLIT["testA"]
    mirror.log.clear()
    # refcoco+ has the same pictures, and its boxes came with refcoco's
    assert download.get("refcoco+", ["val"], got, mirror.url) == []
    assert mirror.log == ["/refcoco+.zip"]
    assert "12 of them there" in capsys.readouterr().out


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_fetch_leaves_whole_files_only_and_goes_on(mirror, tmp_path, how):
    mirror.delay = 0.4
    arguments = ["data", "get", "refcoco", "--split", "val", "--base-url", mirror.url, "--root", str(tmp_path)]
    code = (
        "import bsap_utils.download as d, bsap_utils.cli as c; d.WORKERS = 2; c.app()"  # two, to have time to interrupt
    )
    run = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while len(pictures(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(how)
    assert run.wait(10) != 0
    whole = pictures(tmp_path)
    assert 3 <= len(whole) < PER_SPLIT["val"]
    assert all(path.read_bytes() == mirror.files[f"/train2014/{path.name}"] for path in whole)
    if how == signal.SIGINT:
        assert not leftovers(tmp_path) and b"goes on from here" in run.stderr.read()
    elif leftovers(tmp_path):  # hidden, and swept after a day
        os.utime(leftovers(tmp_path)[0], (0, 0))
    table, wrong = download.check(tmp_path)  # asked for, so not complete
    state = table.set_index("split")["state"]
    assert state["val"].startswith("INCOMPLETE: ") and state["testA"] == "pictures not downloaded"
    assert len([line for line in wrong if line.endswith("missing")]) == PER_SPLIT["val"] - len(whole)
    mirror.delay = 0
    mirror.log.clear()
    assert download.get("refcoco", ["val"], tmp_path, mirror.url) == []
    assert len(mirror.log) == len(mirror.pictures_sent()) == PER_SPLIT["val"] - len(whole)
    assert not leftovers(tmp_path) and download.check(tmp_path)[1] == []


def test_404_and_damaged_pictures_are_all_listed_and_the_rest_is_kept(mirror, tmp_path):
    small, other, cut, short, gone = (
        f"/train2014/{name}" for name in sorted(p[11:] for p in mirror.files if p.endswith(".jpg"))[:5]
    )
    photo = io.BytesIO()
    Image.new("RGB", (100, 100)).save(photo, "jpeg")
    mirror.faults = {small: [photo.getvalue()], other: [b"<html>"], cut: ["cut"], short: ["short"], gone: [404]}
    result = bsap("get", "refcoco", "--root", tmp_path, "--base-url", mirror.url)
    assert result.code == 1
    assert len(pictures(tmp_path)) == sum(PER_SPLIT.values()) - 5 and not leftovers(tmp_path)
    for path, why in {small: "100×100", other: "cannot be decoded", cut: "", short: "", gone: "404 Not Found"}.items():
        assert re.search(rf"{path[11:]}: {mirror.url}/train2014/: .*{why}", result.err), path
    assert (
        "5 pictures could not be got" in result.err
        and "--images" in result.err
        and str(tmp_path / PICTURES) in result.err
    )
    assert mirror.log.count(gone) == 1 and mirror.log.count(cut) == download.ROUNDS  # what may pass is tried again
    mirror.faults = {}
    mirror.log.clear()
    assert download.get("refcoco", root=tmp_path, base_url=mirror.url) == [] and len(mirror.log) == 5


@pytest.mark.parametrize("fault", [500, 503, 429, "cut"])
def test_what_may_pass_is_tried_again_after_a_pause(mirror, tmp_path, monkeypatch, fault):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", lambda seconds: pauses.append(seconds))
    hit = mirror_picture(mirror)
    mirror.faults = {path: [fault, fault, 200] for path in (hit, "/refcoco.zip", "/reclip_data.tar.gz")}
    assert download.get("refcoco", ["val"], tmp_path, mirror.url) == []
    assert mirror.log.count(hit) == mirror.log.count("/refcoco.zip") == 3
    assert pauses.count(0.01) == pauses.count(0.02) == 3  # it doubles


def mirror_picture(mirror: Mirror) -> str:
    return sorted(path for path in mirror.files if path.endswith(".jpg"))[0]


def test_a_damaged_file_on_disk_is_fetched_again(mirror, got):
    broken, cut = pictures(got)[:2]
    broken.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:1000])
    (got / "refcoco_dets_dict.json").write_text("{")
    assert download.get("refcoco", ["val"], got, mirror.url) == []
    assert sorted(mirror.log) == sorted(["/reclip_data.tar.gz", *(f"/train2014/{p.name}" for p in (broken, cut))])
    (got / "SHA256SUMS").unlink()  # what lies there without a record is looked at, and recorded
    cut.write_bytes(cut.read_bytes()[:1000])
    (got / "refcoco/refs(unc).p").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    mirror.log.clear()
    assert download.get("refcoco", ["val"], got, mirror.url) == []
    assert sorted(mirror.log) == sorted(["/refcoco.zip", f"/train2014/{cut.name}"])
    assert download.check(got)[1] == []


def test_another_content_than_at_first_is_refused(mirror, got):
    hit = pictures(got)[0]
    hit.unlink()
    mirror.files[f"/train2014/{hit.name}"] = pictures(got)[1].read_bytes()  # a good picture, of the right size
    problems = download.get("refcoco", ["val"], got, mirror.url)
    assert "not what was first downloaded" in problems[0] and hit.name in problems[0] and not hit.exists()


def test_the_environment_names_a_mirror_and_the_option_goes_first(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("BSAP_BASE_URL", mirror.url)
    assert bsap("get", "refcoco", "--split", "testB", "--root", tmp_path / "a").code == 0
    assert len(mirror.log) == 2 + PER_SPLIT["testB"]
    monkeypatch.setenv("BSAP_BASE_URL", "http://127.0.0.1:9")
    assert bsap("get", "refcoco", "--split", "testB", "--root", tmp_path / "b", "--base-url", mirror.url).code == 0


def test_the_next_address_is_used_when_one_fails(mirror, tmp_path, monkeypatch):
    refused, page = "http://127.0.0.1:9/", f"{mirror.url}/sorry/"
    html = b"<html>This site is down for maintenance.</html>"  # with status 200, as dead hosts like to answer
    mirror.files |= {"/sorry/refcoco.zip": html, "/sorry/reclip_data.tar.gz": html}
    monkeypatch.setattr(
        download,
        "ADDRESSES",
        {
            "refcoco.zip": [refused + "refcoco.zip", page + "refcoco.zip", f"{mirror.url}/refcoco.zip"],
            "reclip_data.tar.gz": [page + "reclip_data.tar.gz", f"{mirror.url}/reclip_data.tar.gz"],
            "train2014/": [page, f"{mirror.url}/train2014/"],
        },
    )
    assert download.get("refcoco", ["testB"], tmp_path) == []
    assert mirror.log.count("/refcoco.zip") == 1 and download.check(tmp_path)[1] == []


def test_the_published_addresses_are_in_the_table_and_the_second_follows_the_first():
    table = download.ADDRESSES
    for name, stamp in {"refcoco": 20220413011718, "refcoco+": 20220413011656, "refcocog": 20220413012904}.items():
        first = f"https://bvisionweb1.cs.unc.edu/licheng/referit/data/{name}.zip"
        assert table[f"{name}.zip"] == [first, f"https://web.archive.org/web/{stamp}/{first}"]
    assert table["reclip_data.tar.gz"][0] == "https://storage.googleapis.com/reclip-sanjays/reclip_data.tar.gz"
    assert table["train2014/"][0] == "http://images.cocodataset.org/train2014/"


def test_no_network_ends_within_seconds_with_all_addresses_and_what_to_do(tmp_path, monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    start = time.monotonic()
    result = bsap("get", "refcoco+", "--root", tmp_path)
    assert result.code == 1 and time.monotonic() - start < 5
    for url in download.ADDRESSES["refcoco+.zip"]:
        assert f"{url}: no answer ([Errno -2] Name or service not known)" in result.err
    assert f"put it at {tmp_path / 'refcoco+.zip'}" in result.err and "BSAP_BASE_URL" in result.err
    assert not list(tmp_path.rglob("*.zip")) and not (tmp_path / "refcoco+").exists()


def test_a_network_lost_on_the_way_is_noticed_and_every_picture_accounted_for(mirror, got, monkeypatch):
    monkeypatch.setattr(download, "WORKERS", 1)
    mirror.shutdown()
    mirror.server_close()
    problems = download.get("refcoco", ["testA", "testB"], got, mirror.url)
    names = {line.split(":")[0] for line in problems[:-1]}
    assert len(names) == PER_SPLIT["testA"] + PER_SPLIT["testB"]
    assert f"{mirror.url}/train2014/: no answer" in problems[0] and "not tried" in problems[1]
    assert problems[-1].startswith("5 pictures could not be got")


def test_an_archive_put_there_by_hand_is_used(mirror, tmp_path):
    for name in ("refcoco.zip", "reclip_data.tar.gz"):
        (tmp_path / name).write_bytes(mirror.files[f"/{name}"])
    assert download.get("refcoco", ["testA"], tmp_path, mirror.url) == []
    assert len(mirror.log) == len(mirror.pictures_sent()) == PER_SPLIT["testA"]
    assert (tmp_path / "refcoco.zip").exists()


def test_without_detections_the_rest_is_got_and_the_exit_code_tells(mirror, tmp_path):
    del mirror.files["/reclip_data.tar.gz"]
    result = bsap("get", "refcoco", "--split", "val", "--root", tmp_path, "--base-url", mirror.url)
    assert result.code == 1 and "reclip_data.tar.gz: 404" in result.err and "only PROPOSALS gt" in result.err
    assert len(pictures(tmp_path)) == PER_SPLIT["val"]
    table, wrong = download.check(tmp_path)
    assert table.set_index("split").loc["val", "state"] == "no detections" and "dets_dict.json" in wrong[0]


def evil_zip(name: str) -> bytes:
    return make_zip({"refcoco/instances.json": b"{}", name: b"evil"})


def link_zip() -> bytes:
    info = zipfile.ZipInfo("refcoco/refs(unc).p")
    info.external_attr = 0o120777 << 16
    buffer = io.BytesIO(make_zip({"refcoco/instances.json": b"{}"}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (evil_zip("../../refs(unc).p"), "lacks refs(unc).p"),
        (evil_zip("/tmp/refs(unc).p"), "lacks refs(unc).p"),
        (evil_zip("..\\refs(unc).p"), "lacks refs(unc).p"),
        (link_zip(), "key 'images'"),
        (make_zip({"refcoco/instances.json": b"{}"}), "lacks refs(unc).p"),
        (make_zip({"refcoco/instances.json": b"0" * 3_000_000, "refcoco/refs(unc).p": b""}), "unpacks to more than"),
        (b"", "cannot be unpacked"),
        (make_zip({"refcoco/refs(unc).p": b"abc" * 99})[:-30], "cannot be unpacked"),
    ],
    ids=["outside", "absolute", "backslash", "symlink", "absent", "bomb", "empty", "short"],
)
def test_a_zip_that_is_unsafe_or_broken_is_refused_whole(mirror, published, tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(download, "UNPACKED_LIMIT", 2_000_000)
    mirror.files["/refcoco.zip"] = content
    root = tmp_path / "deep/er/root"
    with pytest.raises(DatasetError, match=re.escape(message)):
        download.get("refcoco", ["val"], root, mirror.url)
    assert {path.name for path in tmp_path.rglob("*") if not path.is_dir()} <= {"SHA256SUMS"}
    mirror.files["/refcoco.zip"] = published["/refcoco.zip"]
    monkeypatch.setattr(download, "UNPACKED_LIMIT", 9_000_000)
    assert download.get("refcoco", ["testB"], root, mirror.url) == []  # and nothing of it is remembered


def as_link(kind: bytes, target: str):
    def change(info: tarfile.TarInfo) -> tarfile.TarInfo:
        if "dets" in info.name:
            info.type, info.linkname, info.size = kind, target, 0
        return info

    return change


DETS = "reclip_data/refcoco_dets_dict.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_tar({"../refcoco_dets_dict.json": b"{}"}), "not safely"),
        (make_tar({"../../x": b"", DETS: b"{}"}), "not safely"),
        (make_tar({DETS: b""}, as_link(tarfile.SYMTYPE, "/etc/passwd")), "not safely"),
        (make_tar({DETS: b""}, as_link(tarfile.LNKTYPE, "../refcoco/instances.json")), "not safely"),
        (make_tar({DETS: b""}, as_link(tarfile.FIFOTYPE, "")), "not safely"),
        (make_tar({DETS: b""}, as_link(tarfile.SYMTYPE, "other.json")), "lacks refcoco_dets_dict.json"),
        (make_tar({"bomb": b"0" * 3_000_000, DETS: b"{}"}), "unpacks to more than"),
        (make_tar({DETS: b"{}" * 50_000})[:150], "cannot be unpacked"),
        (make_tar({DETS: b"{"}), "not valid JSON"),
        (make_tar({"other": b""}), "lacks refcoco_dets_dict.json"),
    ],
    ids=[
        "above",
        "outside",
        "symlink",
        "hardlink",
        "fifo",
        "inner-link",
        "bomb",
        "short",
        "malformed",
        "absent",
    ],  # bytes hold the time
)
def test_a_tar_that_is_unsafe_or_broken_is_refused_and_the_rest_got(mirror, tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(download, "UNPACKED_LIMIT", 2_000_000)
    mirror.files["/reclip_data.tar.gz"] = content
    problems = download.get("refcoco", ["testB"], tmp_path, mirror.url)
    assert len(problems) == 1 and message in problems[0]
    assert not (tmp_path / "refcoco_dets_dict.json").is_symlink() and len(pictures(tmp_path)) == PER_SPLIT["testB"]


def test_a_full_disk_stops_it_with_a_clear_message(mirror, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    zip_needs = 6 * len(mirror.files["/refcoco.zip"])
    for free, done in ((zip_needs - 1, False), (zip_needs + 1_000_000, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        result = bsap("get", "refcoco", "--split", "val", "--root", tmp_path, "--base-url", mirror.url)
        assert result.code == 1 and "B left, but about" in result.err and "--root" in result.err
        assert (tmp_path / "refcoco/instances.json").exists() == done and not pictures(tmp_path)
    assert "about 1.98MB are needed" in result.err


def test_a_disk_that_fills_while_writing_stops_it(mirror, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(download, "_place", full)
    result = bsap("get", "refcoco", "--root", tmp_path, "--base-url", mirror.url)
    assert result.code == 1 and "somewhere: No space left on device" in result.err


@pytest.mark.parametrize("layout", ["{}", "train2014/{}", "train2017/{}"])
def test_an_existing_coco_folder_is_linked_and_only_what_it_lacks_is_fetched(mirror, tmp_path, layout):
    coco, root = tmp_path / "coco", tmp_path / "root"
    names = sorted(path[11:] for path in mirror.files if path.endswith(".jpg"))
    for name in names[1:]:
        target = coco / layout.format(name.rpartition("_")[2] if "2017" in layout else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(mirror.files[f"/train2014/{name}"])
    damaged = coco / layout.format(names[1].rpartition("_")[2] if "2017" in layout else names[1])
    damaged.write_bytes(b"damaged")
    result = bsap("get", "refcoco", "--root", root, "--base-url", mirror.url, "--images", coco)
    assert result.code == 0, result.err
    assert sorted(mirror.pictures_sent()) == [f"/train2014/{name}" for name in names[:2]]
    assert sum(path.is_symlink() for path in pictures(root)) == len(names) - 2
    assert damaged.read_bytes() == b"damaged"  # the user's own folder is never written to
    assert bsap("check", root).code == 0
    assert "no such folder" in bsap("get", "refcoco", "--root", root, "--images", tmp_path / "typo").err


def test_unknown_names_end_before_anything_is_fetched(mirror, tmp_path):
    for name, split, message in (
        ("refcocoo", "val", "refcoco, refcoco+, refcocog"),
        ("refcocog", "testA", "val, test"),
    ):
        result = bsap("get", name, "--split", split, "--root", tmp_path, "--base-url", mirror.url)
        assert result.code == 1 and message in result.err and not mirror.log


def test_check_of_a_good_root_shows_one_line_a_split(mirror, got):
    result = bsap("check", got)
    assert result.code == 0 and "bsap:" not in result.err
    lines = result.out.splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 130
    header = re.split(r"\s{2,}|(?<=set) (?=split)", lines[0].strip())
    for word in ("images", "regions", "expressions", "candidates/image", "expressions/image", "touched up"):
        assert word in lines[0], header
    table, wrong = download.check(got)
    val = table.set_index("split").loc["val"]
    ds = load_refer(got, "refcoco").select(split="val")
    boxes = json.loads((got / "refcoco_dets_dict.json").read_bytes())
    assert (val["images"], val["regions"], val["expressions"]) == (12, len(ds.regions), len(ds.expressions))
    assert val["candidates/image"] == round(sum(len(boxes[str(i)]) for i in ds.images.index) / 12, 2)
    assert val["expressions/image"] == round(len(ds.expressions) / 12, 2)
    assert val["state"] == "complete" and set(table["state"]) == {"complete", "pictures not downloaded"}


def test_check_counts_boxes_touched_up_and_needs_boxes_of_the_splits_that_count(got):
    val = load_refer(got, "refcoco").select(split="val")
    first, second, *_ = map(str, val.images.index)
    boxes = {key: [[1, 1, 9, 9]] for key in map(str, val.images.index)}  # none of testA, which has no pictures
    boxes |= {first: [[-5, 0, 20, 20], [400, 0, 5, 5], [0, 0, 9, 9]], second: []}
    (got / "refcoco_dets_dict.json").write_text(json.dumps(boxes))
    (got / "SHA256SUMS").unlink()
    table, wrong = download.check(got)
    row = table.set_index("split").loc["val"]
    assert wrong == [] and row["state"] == "complete" and row["without box"] == 1
    assert row["touched up"] == f"{2 / (len(val.regions) + 10 + 3):.2%}"
    (got / "refcoco_dets_dict.json").write_text('{"1": [[0, 0, 9, 9]], "10018": [[0, 0, 9, 9]]}')  # of another data set
    table, wrong = download.check(got)
    assert table.set_index("split").loc["val", "state"] == "no detections"
    assert len(wrong) == 2 and wrong[0].startswith("refcoco val: ") and "PROPOSALS gt" in wrong[0]


def test_check_finds_what_is_missing_broken_or_changed(got):
    gone, tampered, *_ = pictures(got)
    original = tampered.read_bytes()
    gone.unlink()
    tampered.write_bytes(original + b"\0")  # decodes as before
    result = bsap("check", got)
    assert result.code == 1 and "INCOMPLETE: 1 missing, 1 broken" in result.out
    assert f"{gone}: missing" in result.err and f"{tampered}: is not what was first downloaded" in result.err
    (got / "refcoco_dets_dict.json").write_bytes((got / "refcoco_dets_dict.json").read_bytes() + b" ")
    assert "refcoco_dets_dict.json: is not what was first" in bsap("check", got).err
    (got / "refcoco/instances.json").unlink()
    result = bsap("check", got)
    assert result.code == 1 and "instances.json: missing" in result.err
    (got / "SHA256SUMS").write_text("hello\n")
    assert bsap("check", got).code == 1 and "SHA256SUMS" in bsap("check", got).err


def test_check_without_a_record_decodes_every_picture(got):
    (got / "SHA256SUMS").unlink()
    assert download.check(got)[1] == []
    broken, other, *_ = pictures(got)
    broken.write_bytes(broken.read_bytes()[:2000])
    shutil.copy(ROOT / "data/refshapes" / PICTURES / other.name, other)
    table, wrong = download.check(got)
    assert table.set_index("split").loc["val", "state"] == "INCOMPLETE: 0 missing, 1 broken"
    assert len([line for line in wrong if "cannot be decoded" in line and str(broken) in line]) == 1


def test_check_knows_which_splits_were_asked_for(mirror, got):
    """Data sets share pictures: a picture of testA that came by another way does not make testA incomplete."""
    ds = load_refer(got, "refcoco").select(split="testA")
    name = ds.images["file_name"].iloc[0]
    (got / PICTURES / name).write_bytes(mirror.files[f"/train2014/{name}"])
    table, wrong = download.check(got)
    assert wrong == [] and table.set_index("split").loc["testA", "state"] == "not asked for, has 1 pictures"
    (got / "SHA256SUMS").unlink()  # without a record, a split that is partly there should be whole
    table, wrong = download.check(got)
    assert table.set_index("split").loc["testA", "state"] == "INCOMPLETE: 2 missing, 0 broken" and len(wrong) == 2
    shutil.rmtree(got / PICTURES)
    assert "no split is complete" in download.check(got)[1][-1]


def test_check_of_roots_with_several_data_sets_and_of_one_data_set(mirror, got, tmp_path):
    assert download.get("refcoco+", ["testB"], got, mirror.url) == []
    table, wrong = download.check(tmp_path)  # the root lies one folder below
    assert wrong == [] and table.groupby("data set").size().to_dict() == {"refcoco": 3, "refcoco+": 3}
    assert set(download.check(got / "refcoco+")[0]["data set"]) == {"refcoco+"}
    (got / "refcoco+/refs(unc).p").unlink()
    (got / "refcoco+/instances.json").write_text("{")
    table, wrong = download.check(got)
    assert (
        set(table["data set"]) == {"refcoco"} and len([line for line in wrong if "refs(unc).p: missing" in line]) == 1
    )
    assert (
        bsap("check", tmp_path / "nowhere").code == 1 and "holds no data set" in bsap("check", tmp_path / "nowhere").err
    )


def test_the_real_photo_comes_through_the_same_way(mirror, photos, tmp_path):
    folder = photos / "refcoco"
    mirror.files["/refcoco.zip"] = make_zip({f"refcoco/{path.name}": path.read_bytes() for path in folder.iterdir()})
    mirror.files["/reclip_data.tar.gz"] = make_tar({DETS: (photos / "refcoco_dets_dict.json").read_bytes()})
    for path in (photos / PICTURES).iterdir():
        mirror.files[f"/train2014/{path.name}"] = path.read_bytes()
    assert download.get("refcoco", ["val"], tmp_path, mirror.url) == []
    table, wrong = download.check(tmp_path)
    assert wrong == [] and set(table["state"]) == {"complete"} and set(table["images"]) == {1}
    assert list(download.check(photos)[0]["state"]) == ["complete"] * 3  # nothing is written where it only looks
