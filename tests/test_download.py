"""`bsap data get` and `check` against a real server of this machine that has the published layout, and real faults."""

import gzip
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

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from bsap_utils import ROOT, download
from bsap_utils.cli import app
from bsap_utils.datasets import DatasetError, load_refer, read_json

SAMPLE, REAL = ROOT / "data/refshapes", ROOT.parent / "shared/real"
PICTURES = "images/mscoco/images/train2014"
PER_SPLIT = {"val": 12, "testA": 3, "testB": 2}
DETS = "reclip_data/refcoco_dets_dict.json"


class Mirror(ThreadingHTTPServer):
    """Serves `files`; `faults[path]` lists what to do instead, one a GET, the last for ever: a status, "cut" or bytes."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.headers: dict[str, str] = {}
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
            return self.send_error(fault)
        body = fault if isinstance(fault, bytes) else body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
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
    monkeypatch.setattr(download, "PAUSES", (0, 0.01, 0.01))
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
    return SimpleNamespace(code=result.exit_code, out=result.output)  # stderr, too


def pictures(root: Path) -> list[Path]:
    return sorted((root / PICTURES).glob("*.jpg"))


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.startswith((".part-", "tmp")) or ".part" in path.name]


def test_first_fetch_has_only_what_the_split_needs_in_the_layout_of_the_loader(mirror, tmp_path):
    result = bsap("get", "refcoco", "--split", "val", "--root", tmp_path, "--base-url", mirror.url + "/")
    assert result.code == 0, result.out
    assert len(mirror.log) == 2 + PER_SPLIT["val"] and len(set(mirror.log)) == len(mirror.log)
    val = load_refer(tmp_path, "refcoco").select(split="val")
    assert len(val.images) == PER_SPLIT["val"] == len(pictures(tmp_path)) and not val.missing_images()
    assert {path.name for path in tmp_path.glob("*_dets_dict.json")} == {
        f"refcoco{x}_dets_dict.json" for x in ("", "+", "g")
    }
    assert not leftovers(tmp_path) and not list(tmp_path.rglob("._*"))
    assert "refcoco: 12 pictures, 12 to get, about 2 MB" in result.out  # said before it begins


def test_what_is_there_is_not_fetched_again(mirror, got, capsys):
    assert download.get("refcoco", ["val", "testA"], got, mirror.url) == []
    assert sorted(mirror.log) == sorted(mirror.pictures_sent()) and len(mirror.log) == PER_SPLIT["testA"]
    mirror.log.clear()
    # refcoco+ has the same pictures, and its boxes came with refcoco's
    assert download.get("refcoco+", ["val"], got, mirror.url) == []
    assert mirror.log == ["/refcoco+.zip"] and ", 0 to get" in capsys.readouterr().out
    assert read_json(got / "asked.json") == {"refcoco": ["testA", "val"], "refcoco+": ["val"]}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_fetch_leaves_whole_files_only_and_goes_on(mirror, tmp_path, how):
    mirror.delay = 0.5
    arguments = ["data", "get", "refcoco", "--split", "val", "--base-url", mirror.url, "--root", str(tmp_path)]
    code = "import signal, bsap_utils.download as d, bsap_utils.cli as c; d.WORKERS = 2\n"  # two, to have time for it
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); c.app()"
    run = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while run.poll() is None and len(pictures(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(how)
    assert run.wait(60) != 0 and b"Traceback" not in run.stderr.read()
    whole = pictures(tmp_path)
    assert 3 <= len(whole) < PER_SPLIT["val"]
    assert all(path.read_bytes() == mirror.files[f"/train2014/{path.name}"] for path in whole)
    table, wrong = download.check(tmp_path)  # asked for, so not complete
    assert table.set_index("split")["pictures"]["val"] == f"{len(whole)} of 12"
    assert len([line for line in wrong if line.startswith("refcoco val: ")]) == PER_SPLIT["val"] - len(whole)
    mirror.delay = 0
    mirror.log.clear()
    assert download.get("refcoco", ["val"], tmp_path, mirror.url) == []
    assert len(mirror.log) == len(mirror.pictures_sent()) == PER_SPLIT["val"] - len(whole)
    assert download.check(tmp_path)[1] == []


def test_what_killed_downloads_left_is_removed_after_a_day_and_what_others_do_stays(mirror, got):
    old = [got / ".part-abcd_123", got / PICTURES / ".part-abcd_124"]
    others = [got / ".part-abcd_125", got / ".part-mine"]
    for folder in old + others:
        folder.mkdir()
        (folder / "refcoco.zip").write_bytes(b"half")
    for folder in (*old, others[1]):
        os.utime(folder, (time.time() - 90_000,) * 2)
    assert download.get("refcoco", ["val"], got, mirror.url) == []
    assert [folder.exists() for folder in old + others] == [False, False, True, True]


def test_404_and_damaged_pictures_are_all_listed_and_the_rest_is_kept(mirror, tmp_path):
    small, other, cut, gone = (f"/train2014/{name}" for name in sorted(p[11:] for p in mirror.files if ".jpg" in p)[:4])
    photo = io.BytesIO()
    Image.new("RGB", (100, 100)).save(photo, "jpeg")
    mirror.faults = {small: [photo.getvalue()], other: [b"<html>"], cut: ["cut"], gone: [404]}
    result = bsap("get", "refcoco", "--root", tmp_path, "--base-url", mirror.url)
    assert result.code == 1 and len(pictures(tmp_path)) == sum(PER_SPLIT.values()) - 4 and not leftovers(tmp_path)
    for path, why in {small: "100", other: "", cut: "", gone: "404"}.items():
        assert re.search(rf"{mirror.url}{path}: .*{why}", result.out), path
    assert mirror.log.count(gone) == 1 and mirror.log.count(cut) == len(download.PAUSES)  # what may pass is tried again
    mirror.faults = {}
    mirror.log.clear()
    assert download.get("refcoco", [], tmp_path, mirror.url) == [] and len(mirror.log) == 4


@pytest.mark.parametrize("fault", [503, 429, "cut"])
def test_what_may_pass_is_tried_again(mirror, tmp_path, fault):
    hit = sorted(path for path in mirror.files if path.endswith(".jpg"))[0]
    mirror.faults = {path: [fault, fault, 200] for path in (hit, "/refcoco.zip", "/reclip_data.tar.gz")}
    assert download.get("refcoco", ["val"], tmp_path, mirror.url) == []
    assert mirror.log.count(hit) == mirror.log.count("/refcoco.zip") == 3


def test_a_damaged_picture_on_disk_is_fetched_again(mirror, got):
    broken, cut = pictures(got)[:2]
    broken.write_bytes(b"")
    cut.write_bytes(cut.read_bytes()[:1000])
    assert download.get("refcoco", ["val"], got, mirror.url) == []
    assert sorted(mirror.log) == sorted(f"/train2014/{p.name}" for p in (broken, cut))
    assert download.check(got)[1] == []


def test_the_environment_names_a_mirror_and_the_option_goes_first(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("BSAP_BASE_URL", mirror.url)
    assert bsap("get", "refcoco", "--split", "testB", "--root", tmp_path / "a").code == 0
    assert len(mirror.log) == 2 + PER_SPLIT["testB"]
    monkeypatch.setenv("BSAP_BASE_URL", "http://127.0.0.1:9")
    assert bsap("get", "refcoco", "--split", "testB", "--root", tmp_path / "b", "--base-url", mirror.url).code == 0


def hosts(*folders: str) -> dict:
    return dict.fromkeys(("refcoco.zip", "reclip_data.tar.gz", "train2014/"), list(folders))


def test_the_next_address_is_used_when_one_fails(mirror, tmp_path, monkeypatch):
    html = b"<html>This site is down for maintenance.</html>"  # with status 200, as dead hosts like to answer
    mirror.files |= {"/sorry/refcoco.zip": html, "/sorry/reclip_data.tar.gz": html}
    monkeypatch.setattr(download, "HOSTS", hosts("http://127.0.0.1:9/", f"{mirror.url}/sorry/", f"{mirror.url}/"))
    assert download.get("refcoco", ["testB"], tmp_path) == []
    assert mirror.log.count("/refcoco.zip") == 1 and download.check(tmp_path)[1] == []


def addresses(file: str) -> list[str]:
    return [host + file for host in download.HOSTS[file]]


def test_the_published_addresses_are_in_the_table_and_the_second_follows_the_first():
    for name, stamp in {"refcoco": 20220413011718, "refcoco+": 20220413011656, "refcocog": 20220413012904}.items():
        first = f"https://bvisionweb1.cs.unc.edu/licheng/referit/data/{name}.zip"
        assert addresses(f"{name}.zip") == [first, f"https://web.archive.org/web/{stamp}/{first}"]
    assert addresses("reclip_data.tar.gz")[0] == "https://storage.googleapis.com/reclip-sanjays/reclip_data.tar.gz"
    assert addresses("train2014/")[0] == "http://images.cocodataset.org/train2014/"
    for file in filter(download.HASHES.get, download.HASHES):
        assert re.fullmatch(r"https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/[0-9a-f]{40}/.*", addresses(file)[0])


def test_no_network_ends_within_seconds_with_all_addresses_and_what_to_do(tmp_path, monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:1")
    start = time.monotonic()
    result = bsap("get", "refcoco+", "--root", tmp_path)
    assert result.code == 1 and time.monotonic() - start < 10
    for url in addresses("refcoco+.zip"):
        assert f"{url}: " in result.out
    assert "HTTPS_PROXY" in result.out and f"put it at {tmp_path / 'refcoco+.zip'}" in result.out
    assert not list(tmp_path.rglob("*.zip"))


def test_a_network_lost_on_the_way_is_noticed(mirror, got, monkeypatch):
    monkeypatch.setattr(download, "WORKERS", 2)
    mirror.shutdown()
    mirror.server_close()
    problems = download.get("refcoco", [], got, mirror.url)  # of which val is here
    assert f"{mirror.url}/train2014/" in problems[0] and problems[-1].startswith("5 pictures could not be got")


def test_an_archive_put_there_by_hand_is_used(mirror, tmp_path):
    for name in ("refcoco.zip", "reclip_data.tar.gz"):
        (tmp_path / name).write_bytes(mirror.files[f"/{name}"])
    assert download.get("refcoco", ["testA"], tmp_path, mirror.url) == []
    assert len(mirror.log) == len(mirror.pictures_sent()) == PER_SPLIT["testA"]
    (tmp_path / "refcoco+.zip").write_bytes(b"mine")  # damaged, but not ours to remove
    with pytest.raises(DatasetError):
        download.get("refcoco+", ["testA"], tmp_path, mirror.url)
    assert (tmp_path / "refcoco+.zip").read_bytes() == b"mine"


def test_without_detections_the_rest_is_got_and_the_exit_code_tells(mirror, tmp_path):
    del mirror.files["/reclip_data.tar.gz"]
    result = bsap("get", "refcoco", "--split", "val", "--root", tmp_path, "--base-url", mirror.url)
    assert result.code == 1 and "reclip_data.tar.gz: 404" in result.out and "only PROPOSALS gt" in result.out
    assert len(pictures(tmp_path)) == PER_SPLIT["val"]
    assert download.check(tmp_path)[0].set_index("split")["detections"]["val"] == "none"


def lists_of(root: Path, name: str, split: str) -> bytes:
    """The small public JSON of a split, made of a root in the UNC layout."""
    ds = load_refer(root, name).select(split=split)
    table = ds.expressions.join(ds.annotations[["x", "y", "w", "h"]], on="ann_id").join(ds.images, on="image_id")
    rows = [{"img_id": f"{row.file_name[:-4]}_{number}", "sents": row.text, "bbox": [row.x, row.y, row.w, row.h],
             "height": row.height, "width": row.width} for number, row in enumerate(table.itertuples())]  # fmt: skip
    return json.dumps(rows, default=int).encode()


def test_without_the_archive_the_public_lists_take_its_place(mirror, got, tmp_path, monkeypatch):
    mirror.files["/refcoco_val.json"] = lists_of(got, "refcoco", "val")
    del mirror.files["/refcoco.zip"]
    monkeypatch.setattr(download, "HASHES", {})
    result = bsap("get", "refcoco", "--split", "val", "--root", tmp_path / "lists", "--base-url", mirror.url)
    assert result.code == 0, result.out
    assert "Lists take its place" in result.out and "PROPOSALS gt" in result.out
    both = [load_refer(root, "refcoco").select(split="val") for root in (got, tmp_path / "lists")]
    keys = ["file_name", "text", "x", "y", "w", "h"]
    tables = [
        ds.expressions.join(ds.annotations[keys[2:]], on="ann_id").join(ds.images, on="image_id")[keys] for ds in both
    ]
    first, second = (table.sort_values(keys).reset_index(drop=True) for table in tables)
    pd.testing.assert_frame_equal(first, second, check_dtype=False)  # the same expressions and boxes out of both
    assert bsap("check", tmp_path / "lists").code == 0


def test_what_has_another_hash_is_refused(mirror, got, tmp_path):
    mirror.files["/refcoco_val.json"] = lists_of(got, "refcoco", "val")
    del mirror.files["/refcoco.zip"]
    with pytest.raises(DatasetError, match="SHA256 hash of downloaded file"):
        download.get("refcoco", ["val"], tmp_path / "lists", mirror.url)
    assert not list((tmp_path / "lists").rglob("*.json"))


def evil_zip(name: str) -> bytes:
    return make_zip({"refcoco/instances.json": b"{}", name: b"evil"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (evil_zip("../../refs(unc).p"), "refcoco cannot be read"),
        (evil_zip("/tmp/refs(unc).p"), "refcoco cannot be read"),
        (make_zip({"refcoco/instances.json": b"{}"}), "no such file"),
        (make_zip({"refcoco/instances.json": b"0" * 3_000_000, "refcoco/refs(unc).p": b""}), "unpacks to more than"),
        (make_zip({"refcoco/refs(unc).p": b"abc" * 99})[:-30], "safe to unpack"),
    ],
    ids=["outside", "absolute", "absent", "bomb", "short"],
)
def test_a_zip_that_is_unsafe_or_broken_is_refused_whole(mirror, tmp_path, monkeypatch, content, message, capsys):
    monkeypatch.setattr(download, "LIMIT", 2_000_000)
    mirror.files["/refcoco.zip"] = content
    root = tmp_path / "deep/er/root"
    root.mkdir(parents=True)
    with pytest.raises(DatasetError):
        download.get("refcoco", ["val"], root, mirror.url)
    assert message in capsys.readouterr().out
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def as_link(kind: bytes, target: str):
    def change(info: tarfile.TarInfo) -> tarfile.TarInfo:
        if "dets" in info.name:
            info.type, info.linkname, info.size = kind, target, 0
        return info

    return change


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (make_tar({"../refcoco_dets_dict.json": b"{}"}), "safe to unpack"),
        (make_tar({DETS: b""}, as_link(tarfile.SYMTYPE, "/etc/passwd")), "safe to unpack"),
        (make_tar({DETS: b""}, as_link(tarfile.LNKTYPE, "../refcoco/instances.json")), "safe to unpack"),
        (make_tar({DETS: b""}, as_link(tarfile.FIFOTYPE, "")), "safe to unpack"),
        (make_tar({DETS: b""}, as_link(tarfile.SYMTYPE, "other.json")), "refcoco_dets_dict.json"),
        (make_tar({"bomb": b"0" * 3_000_000, DETS: b"{}"}), "unpacks to more than"),
        (make_tar({DETS: b"{}" * 50_000})[:150], "safe to unpack"),
        (make_tar({DETS: b"{"}), "valid JSON"),
    ],
    ids=["above", "symlink", "hardlink", "fifo", "inner-link", "bomb", "short", "malformed"],  # bytes hold the time
)
def test_a_tar_that_is_unsafe_or_broken_is_refused_and_the_rest_got(mirror, tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(download, "LIMIT", 2_000_000)
    mirror.files["/reclip_data.tar.gz"] = content
    problems = download.get("refcoco", ["testB"], tmp_path, mirror.url)
    assert len(problems) == 1 and message in problems[0]
    assert not (tmp_path / "refcoco_dets_dict.json").is_symlink() and len(pictures(tmp_path)) == PER_SPLIT["testB"]


def test_a_compressed_bomb_stops_at_the_limit(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LIMIT", 2_000_000)
    mirror.headers["Content-Encoding"] = "gzip, gzip"
    mirror.files["/refcoco.zip"] = gzip.compress(gzip.compress(b"\0" * 200_000_000, 9))
    with pytest.raises(DatasetError):
        download.get("refcoco", ["val"], tmp_path, mirror.url)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("layout", ["{}", "train2014/{}", "train2017/{}"])
def test_an_existing_coco_folder_is_linked_and_only_what_it_lacks_is_fetched(mirror, tmp_path, layout, monkeypatch):
    monkeypatch.chdir(tmp_path)
    coco, root = tmp_path / "coco", tmp_path / "root"
    names = sorted(path[11:] for path in mirror.files if path.endswith(".jpg"))
    for name in names[1:]:
        target = coco / layout.format(name.rpartition("_")[2] if "2017" in layout else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(mirror.files[f"/train2014/{name}"])
    damaged = coco / layout.format(names[1].rpartition("_")[2] if "2017" in layout else names[1])
    damaged.write_bytes(b"damaged")
    result = bsap("get", "refcoco", "--root", root, "--base-url", mirror.url, "--images", "coco")
    assert result.code == 0, result.out
    assert sorted(mirror.pictures_sent()) == [f"/train2014/{name}" for name in names[:2]]
    assert sum(path.is_symlink() for path in pictures(root)) == len(names) - 2
    assert damaged.read_bytes() == b"damaged"  # the user's own folder is never written to
    assert bsap("check", root).code == 0
    coco.rename(tmp_path / "moved")  # the links lead nowhere now
    assert download.get("refcoco", [], root, mirror.url, tmp_path / "moved") == []
    assert len(mirror.pictures_sent()) == 2 and download.check(root)[1] == []


def test_unknown_names_end_before_anything_is_fetched(mirror, tmp_path):
    for name, split in (("refcocoo", "val"), ("refcocog", "testA")):
        result = bsap("get", name, "--split", split, "--root", tmp_path, "--base-url", mirror.url)
        assert result.code == 1 and "'refcocog': ['train', 'val', 'test']" in result.out and not mirror.log


def test_check_says_what_is_here_and_what_is_wrong(mirror, got, tmp_path, monkeypatch):
    result = bsap("check", got)
    assert result.code == 0 and "wrong" not in result.out
    table = download.check(got)[0].set_index("split")
    assert table.loc["val", "pictures"] == "complete"
    assert table.loc["testA", "pictures"] == "0 of 3"  # not asked for, so not wrong
    ds = load_refer(got, "refcoco").select(split="testA")
    name = ds.images["file_name"].iloc[0]  # data sets share pictures: one that came another way asks for nothing
    (got / PICTURES / name).write_bytes(mirror.files[f"/train2014/{name}"])
    assert download.check(got)[1] == []
    (got / "asked.json").unlink()  # without a record, a split that is partly there should be whole
    assert len(download.check(got)[1]) == 2
    assert download.get("refcoco+", ["testB"], got, mirror.url) == []
    assert set(download.check(got)[0]["data set"]) == {"refcoco", "refcoco+"}
    monkeypatch.chdir(got / "refcoco+")
    assert set(download.check(".")[0]["data set"]) == {"refcoco+"}
    gone, cut, *_ = pictures(got)
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:2000])
    result = bsap("check", got)
    assert result.code == 1 and "10 of 12" in result.out and str(gone) in result.out and str(cut) in result.out
    (got / "refcoco+/instances.json").write_text("{")
    assert "instances.json" in bsap("check", got).out
    assert bsap("check", tmp_path / "nowhere").code == 1


def test_check_takes_no_candidates_for_a_data_set():
    """The sample lies in a folder of its own name, beside its detections."""
    table, wrong = download.check(SAMPLE)
    assert wrong == [] and table["split"].tolist() == ["test", "train", "val"]
    assert set(table["pictures"]) == {"complete"} and (table[["detections", "rpn", "masks"]] == "there").all(axis=None)


def test_check_looks_at_boxes_and_masks(got):
    content = json.loads((got / "refcoco/instances.json").read_bytes())
    for annotation in content["annotations"]:  # as labelling tools export
        annotation["segmentation"] = [] if annotation["image_id"] % 2 else [[1, 1, 2, 2]]
    (got / "refcoco/instances.json").write_text(json.dumps(content))
    result = bsap("check", got)
    assert result.code == 0 and " 0% " in result.out
    path = got / "refcoco_dets_dict.json"
    boxes = {
        key: [[x, y, x + w, y + h] for x, y, w, h in found] for key, found in json.loads(path.read_bytes()).items()
    }
    path.write_text(json.dumps(boxes))
    result = bsap("check", got)
    assert result.code == 1 and "not corners" in result.out and "wrong" in result.out
    path.unlink()
    (got / "refcoco_masks.json").write_text('[{"image_id": 1, "segmentation": {"size": [1, 1], "counts": "nonsense"}}]')
    assert bsap("check", got).code == 1


needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="real material lies beside the checkout of our machines only")


@needs_real
def test_real_lists_have_the_published_hashes_and_counts(mirror, tmp_path, monkeypatch):
    del mirror.files["/refcoco.zip"], mirror.files["/refcoco+.zip"]
    for path in (REAL / "refcoco-expressions").glob("*.json"):
        mirror.files[f"/{path.name}"] = path.read_bytes()
    monkeypatch.setattr(download, "get_pictures", lambda *_: [])
    monkeypatch.setattr(download, "from_boxes", lambda *_: [])
    counts = {"refcoco": [5657, 5095, 10834], "refcoco+": [5726, 4889, 10758], "refcocog": [9602, 4896]}
    for name, expected in counts.items():
        download.get(name, [], tmp_path, mirror.url)
        found = load_refer(tmp_path, name).expressions["split"].value_counts().sort_index()
        assert found.tolist() == expected, name


@needs_real
def test_clip_scores_are_got_and_repacked(mirror, tmp_path, monkeypatch):
    mirror.files["/features_clip.npy"] = (REAL / "clip-scores/coco_val2017_vitb16.npy").read_bytes()
    arrays = np.load(REAL / "clip-scores/things_vith14.npz")
    buffer = io.BytesIO()
    torch.save({"img_features": torch.tensor(arrays["images"]), "text_features": torch.tensor(arrays["texts"])}, buffer)
    mirror.files["/ViT-H-14_features_test.pt"] = buffer.getvalue()
    assert bsap("get", "clip-scores", "--root", tmp_path, "--base-url", mirror.url).code == 1  # another hash
    monkeypatch.setitem(download.HASHES, "ViT-H-14_features_test.pt", None)  # the published file itself is not here
    result = bsap("get", "clip-scores", "--root", tmp_path, "--base-url", mirror.url)
    assert result.code == 0, result.out
    assert sorted(p.name for p in (tmp_path / "clip-scores").iterdir()) == [
        "coco_val2017_vitb16.npy",
        "things_vith14.npz",
    ]
    with np.load(tmp_path / "clip-scores/things_vith14.npz") as found:
        np.testing.assert_array_equal(found["images"], arrays["images"])
        np.testing.assert_array_equal(found["texts"], arrays["texts"])
    mirror.log.clear()
    assert download.get("clip-scores", [], tmp_path, mirror.url) == [] and not mirror.log


def test_a_torch_file_that_would_run_code_is_refused(mirror, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "evil",)

    monkeypatch.setattr(download, "HASHES", {})
    buffer = io.BytesIO()
    torch.save({"img_features": Evil()}, buffer)
    numbers = io.BytesIO()
    np.save(numbers, np.zeros((2, 3, 4), np.float32))
    mirror.files |= {"/features_clip.npy": numbers.getvalue(), "/ViT-H-14_features_test.pt": buffer.getvalue()}
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        download.get("clip-scores", [], tmp_path, mirror.url)
    assert not (tmp_path / "evil").exists() and not (tmp_path / "clip-scores/things_vith14.npz").exists()
