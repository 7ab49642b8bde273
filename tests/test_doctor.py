"""`bsap doctor` on clones of its own: real folders, a Hugging Face cache in its real layout, a real server as the hub."""

import json
import pickle
import shutil
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from typer.testing import CliRunner

from bsap_utils import ROOT, cli, doctor, refshapes
from bsap_utils.download import FOLDER, SPLITS
from bsap_utils.scoring import ModelError


@pytest.fixture(scope="session")
def benchmark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    refshapes.write_benchmark(folder, images_per_split=2)
    return folder


@pytest.fixture
def clone(tmp_path, benchmark, monkeypatch):
    """A clone with the sample and nothing else, on a machine without a network and without any weights."""
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    shutil.copytree(benchmark, root / "data/refshapes")
    shutil.copytree(ROOT / "data/clip-refshapes", root / "data/clip-refshapes")
    monkeypatch.setattr(cli, "ROOT", root)
    monkeypatch.setenv("BSAP_CACHE", str(root / "data/cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root


def examine() -> tuple[bool, str]:
    lines: list[str] = []
    return doctor.report(lines.append), "\n".join(lines)


def cached(clone: Path, repository: str, name: str) -> Path:
    """A file as the hub's client leaves it: blobs/<hash>, and a link to it in snapshots/<commit>."""
    folder = clone.parent / "hub" / f"models--{repository.replace('/', '--')}"
    for part in ("blobs", "refs", "snapshots/abc"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(2)}, folder / f"blobs/{name}-hash")
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc" / name).symlink_to(f"../../blobs/{name}-hash")
    return folder


def refcoco(clone: Path, benchmark: Path) -> Path:
    """The sample in RefCOCO's place, its test split as testA, pictures and detections included."""
    data = clone / "data"
    shutil.copytree(benchmark / "refshapes", data / "refcoco")
    shutil.copytree(benchmark / "images", data / "images")
    shutil.copy(benchmark / "refshapes_dets_dict.json", data / "refcoco_dets_dict.json")
    refs = pickle.loads((data / "refcoco/refs(unc).p").read_bytes())
    named = [{**ref, "split": ref["split"].replace("test", "testA")} for ref in refs]
    (data / "refcoco/refs(unc).p").write_bytes(pickle.dumps(named))
    return data


def test_a_fresh_clone_can_run_the_sample_and_says_what_refcoco_lacks(clone):
    (clone / "data/cache/a").mkdir(parents=True)
    (clone / "data/cache/a/features").write_bytes(b"x" * 1234)
    runnable, text = examine()
    assert runnable and text.endswith("Next: make figures")
    assert (
        "  ✓ local-dir:data/clip-refshapes\n" in text and "  ✓ refshapes test,val\n" in text and "  ✓ sample\n" in text
    )
    assert f"torch {torch.__version__.split('+')[0]}" in text and f"pandas {metadata.version('pandas')}" in text
    assert "cache     1 files, 1.23kB, in data/cache\n" in text
    assert f"ViT-B-32 openai: not in {clone.parent}/hub\n" in text
    assert "cannot be reached: on a machine with a network download" in text and "timm/resnet50x16_clip.openai" in text
    assert "refcoco testA,val: there is no folder data/refcoco\n      bsap data get refcoco --split testA,val\n" in text
    assert "  ✗ reclip: lacks RN50x16, ViT-B-32, refcoco\n" in text


def test_with_data_and_weights_the_next_command_is_the_real_run(clone, benchmark):
    refcoco(clone, benchmark)
    cached(clone, "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")
    runnable, text = examine()
    assert runnable and "  ✓ ViT-B-32 openai\n" in text and "  ✓ refcoco testA,val\n" in text
    assert "  ✓ refcoco-vitb32\n" in text and "  ✗ refcoco+-vitb32: lacks refcoco+\n" in text
    assert text.endswith("Next: bsap run --all --params notebooks/params/refcoco-vitb32.yaml")


def test_a_hub_that_answers_is_asked_once_and_fetches_what_lacks(clone, monkeypatch):
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        text = examine()[1]
        server.shutdown()
    assert text.count("the first run fetches them") == 3 and "cannot be reached" not in text and len(asked) == 1


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: next((r / "data/refshapes" / FOLDER).glob("*010001.jpg")).unlink(), "1 of 2 pictures of val are missing"),
        (lambda r: cut(r / "data/refshapes/refshapes/instances.json"), "instances.json: is not valid JSON"),
        (lambda r: cut(r / "data/refshapes/refshapes/refs(unc).p"), "refs(unc).p: is not a complete pickle"),
        (lambda r: (r / "data/refshapes/refshapes_dets_dict.json").unlink(), "refshapes_dets_dict.json: cannot be read"),
        (lambda r: cut(r / "data/refshapes/refshapes_masks.json"), "refshapes_masks.json: is not valid JSON"),
        (lambda r: shutil.rmtree(r / "data/refshapes"), "there is no folder data/refshapes/refshapes"),
        (lambda r: cut(r / "data/clip-refshapes/open_clip_model.safetensors"), "open_clip_model.safetensors is damaged ("),
        (lambda r: (r / "data/clip-refshapes/open_clip_model.safetensors").unlink(), "not in data/clip-refshapes"),
        (lambda r: (r / "data/clip-refshapes/open_clip_config.json").unlink(), "no open_clip_config.json there"),
        (lambda r: (r / "notebooks/params/sample.yaml").write_text("all: {"), "sample: cannot read notebooks/params/sample"),
        (lambda r: (r / "notebooks/params/sample.yaml").unlink(), "Next: git checkout -- data notebooks"),
        (lambda r: cut(r / "notebooks/03_rec.ipynb"), "cannot read the parameters of notebooks/03_rec.ipynb"),
    ],
)  # fmt: skip
def test_damage_is_a_line_and_the_sample_not_runnable(clone, damage, said):
    damage(clone)
    runnable, text = examine()
    assert not runnable and said in text and "✓ sample" not in text and "Next: git checkout -- data notebooks" in text
    assert str(clone) not in text.split("\n", 1)[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [("- 1", "should hold names and values"), ("all: {SPLITT: val}", "no parameter SPLITT"), ("\0", "cannot")],
)
def test_a_damaged_params_file_of_another_run_leaves_the_sample_runnable(clone, text, said):
    (clone / "notebooks/params/reclip.yaml").write_text(text)
    runnable, shown = examine()
    assert runnable and said in shown.split("runs\n")[1] and "✗ reclip: " in shown and "✓ sample" in shown


def test_no_cache_is_said(clone, monkeypatch):
    monkeypatch.setenv("BSAP_CACHE", "")
    assert "cache     none (BSAP_CACHE is empty)\n" in examine()[1]


def test_exit_codes(clone):
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0
    shutil.rmtree(clone / "data/refshapes/images")
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1 and "2 of 2 pictures of test are missing" in result.output


def test_weights_are_found_where_open_clip_looks(clone):
    laion = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    with pytest.raises(ModelError, match="not in .*hub"):
        doctor.find_weights("ViT-B-32", "laion2b_s34b_b79k")
    folder = cached(clone, laion, "open_clip_pytorch_model.bin")
    assert doctor.find_weights("ViT-B-32", "laion2b_s34b_b79k").name == "open_clip_pytorch_model.bin"
    assert doctor.find_weights(f"hf-hub:{laion}", "") == folder / "snapshots/abc/open_clip_pytorch_model.bin"
    (folder / "blobs/open_clip_pytorch_model.bin-hash").unlink()  # the link is there, what it means is not
    with pytest.raises(ModelError, match="not in"):
        doctor.find_weights("ViT-B-32", "laion2b_s34b_b79k")
    (clone / "mine.pt").touch()
    assert doctor.find_weights("ViT-B-32", "mine.pt") == clone / "mine.pt"
    for model, tag, said in (("ViT-B-33", "openai", "no model"), ("ViT-B-32", "opneai", "Nearest: openai")):
        with pytest.raises(ModelError, match=said):
            doctor.find_weights(model, tag)


def test_weights_that_have_an_address_only_lie_in_the_older_place(clone, monkeypatch):
    record = {"url": "https://example.org/clip/vit.pt", "quick_gelu": True}
    monkeypatch.setattr(doctor.open_clip, "get_pretrained_cfg", lambda model, tag: record)
    with pytest.raises(ModelError, match=r"not in .*\.cache/clip/vit\.pt"):
        doctor.find_weights("ViT-B-32", "openai")
    (clone.parent / ".cache/clip").mkdir(parents=True)
    (clone.parent / ".cache/clip/vit.pt").touch()
    assert doctor.find_weights("ViT-B-32", "openai") == clone.parent / ".cache/clip/vit.pt"


def test_a_large_data_set_is_judged_by_its_files(clone, benchmark, monkeypatch):
    data = refcoco(clone, benchmark)
    monkeypatch.setattr(doctor, "LARGE", 0)
    monkeypatch.setattr(doctor, "load_refer", None)  # it would take too long

    def problems(*splits, proposals=("gt", "detections")):
        return doctor.data_problems(data, "refcoco", splits, proposals)

    assert problems("val") == ["the pictures of val were not got, or not all of them"]  # 6 of 1,500
    monkeypatch.setitem(SPLITS, "refcoco", {"val": 6, "testA": 6})
    assert problems("val", "testA") == []
    assert problems("test") == ["the pictures of test were not got, or not all of them"]
    assert problems("val", proposals=["gt", "masks"]) == ["data/refcoco_masks.json is missing"]
    (data / "SHA256SUMS").write_text("# refcoco val\n")
    assert problems("val", "testA") == ["the pictures of testA were not got, or not all of them"]
    (data / "SHA256SUMS").write_text("nonsense\n")
    assert "SHA256SUMS: has lines" in problems("val")[0]
    (data / "SHA256SUMS").unlink()
    (data / "refcoco_dets_dict.json").unlink()
    (data / "refcoco/refs(unc).p").unlink()
    assert problems("val") == ["data/refcoco/refs(unc).p is missing", "data/refcoco_dets_dict.json is missing"]


def test_every_params_file_asks_for_splits_that_there_are_and_says_how_to_get_them(sample):
    known = {file.stem: cli.declared(file) for file in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    for params in (ROOT / "notebooks/params").glob("*.yaml"):
        data = doctor.needs(params, known)[1]
        for name in {name for _, name, *_ in data}:
            splits = {split for _, of, split, _ in data if of == name}
            assert splits <= set(SPLITS.get(name, sample.splits)), params.name
            if name in SPLITS:
                named = params.read_text().split(f"bsap data get {name} --split ")[1].split()[0].rstrip(".")
                assert splits == set(named.split(",")), params.name


def test_needs_of_several_models_and_of_a_root_elsewhere(clone):
    params = clone / "notebooks/params/two.yaml"
    params.write_text(json.dumps({"all": {"MODEL": ["ViT-B-32", "local-dir:x"], "PRETRAINED": ["openai", "openai"],
                                          "DATASET": "mine", "DATA_ROOT": "elsewhere"}, "skip": ["02_bsap_method"],
                                  "03_rec": {"SPLIT": "val", "PROPOSALS": "boxes.json"}}))  # fmt: skip
    known = {stem: cli.declared(clone / f"notebooks/{stem}.ipynb") for stem in ("02_bsap_method", "03_rec")}
    weights, data = doctor.needs(params, known)
    assert weights == {("ViT-B-32", "openai"), ("local-dir:x", "")}
    assert data == {(clone / "elsewhere", "mine", "val", "boxes.json")}
