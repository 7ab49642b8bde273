"""Models by name: every kind that open_clip has, and one sentence for everything that can go wrong with one."""

import http.server
import json
import os
import shutil
import socket
import threading
import time
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bsap_utils import scoring
from bsap_utils.normalization import METHODS
from bsap_utils.regions import ground_truth, pair_up
from bsap_utils.scoring import ClipScorer, ModelError

SMALL = "ViT-S-32-alt"  # the smallest that open_clip lists
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TOWER = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}


def timm(name, size, pool, proj=None, **more):
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size, **more}


HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
FAMILY = {  # a configuration as open_clip has it, with the smallest tower that timm has of the kind, and preprocessing
    "SigLIP 2": (
        {"embed_dim": 192, "init_logit_bias": -10, "custom_text": True,
         "vision_cfg": timm("vit_tiny_patch16_224", 224, "token", "none"),
         "text_cfg": {**TEXT, "vocab_size": 64, "context_length": 12, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP2",
                      "tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True, "proj_bias": True,
                      "pool_type": "last", "act_kwargs": {"approximate": "tanh"}}},
        {**HALF, "interpolation": "bicubic"}),
    "MobileCLIP 2": (
        {"embed_dim": 16, "custom_text": True, "vision_cfg": timm("fastvit_mci0", 64, "avg", timm_drop_path=0.0),
         "text_cfg": {**TEXT, "no_causal_mask": True}},
        {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear", "resize_mode": "shortest"}),
    "EVA": (
        {"embed_dim": 16, "custom_text": True, "vision_cfg": timm("eva02_tiny_patch14_224", 224, "token"), "text_cfg": TEXT},
        {"interpolation": "bicubic", "resize_mode": "shortest"}),
    "PE-Core": (
        {"embed_dim": 16, "custom_text": True, "vision_cfg": timm("vit_pe_core_tiny_patch16_384", 384, "map"),
         "text_cfg": {**TEXT, "context_length": 20}},
        HALF),
    "ConvNeXt": (
        {"embed_dim": 16, "vision_cfg": timm("convnext_atto", 64, "", "linear", timm_drop=0.0), "text_cfg": TEXT},
        {"interpolation": "bicubic", "resize_mode": "shortest"}),
    "CoCa": (
        {"embed_dim": 16, "custom_text": True,
         "vision_cfg": {**TOWER, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
         "text_cfg": {**TEXT, "context_length": 15, "embed_cls": True, "output_tokens": True},
         "multimodal_cfg": {**TEXT, "context_length": 15, "attn_pooler_heads": 2}},
        {}),
    "not square": ({"embed_dim": 16, "vision_cfg": {**TOWER, "image_size": [48, 80]}, "text_cfg": TEXT}, HALF),
}  # fmt: skip


def save(folder, config, preprocess):
    """Save a model of open_clip's own classes, with random weights, in the layout of `local-dir:`."""
    folder.mkdir()
    torch.manual_seed(0)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    net = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    save_file(
        {key: value.contiguous() for key, value in net.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    if "hf_tokenizer_name" in config["text_cfg"]:
        transformers = pytest.importorskip("transformers", reason="tokenizers of SigLIP need the extra `sam`")
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {
            word: number for number, word in enumerate(["<pad>", "<unk>", "a", "photo", "of", "star", "key", "red"])
        }
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
        fast.save_pretrained(folder)
    return f"local-dir:{folder}", net.eval()


@pytest.mark.parametrize("kind", FAMILY)
def test_every_kind_of_model_goes_through_scoring_bsap_and_the_index(kind, sample, tmp_path):
    config, preprocess = FAMILY[kind]
    model, net = save(tmp_path / "model", config, preprocess)
    scorer = ClipScorer(model, device="cpu", cache=False)
    ds = sample.select(split="val", limit=1)
    candidates, bank = ground_truth(ds).head(5), ["star", "red key", "key"]
    pairs = pair_up(ds, candidates)
    image, text = scorer.encode_regions(ds, candidates), scorer.encode_texts(ds.expressions["text"], "a photo of {}")
    aux = scorer.encode_texts(bank, "a photo of {}")
    s, a = scorer.pair_logits(image, text, pairs), scorer.logits(image, aux)

    # against open_clip's own pictures, tokens and logits; squashed where its preprocessing would cut the centre out
    theirs = dict(net.visual.preprocess_cfg, resize_mode="squash")
    prepare = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**theirs), is_train=False)
    pictures = [ds.load_image(image_id) for image_id in ds.images.index]
    with torch.inference_mode():
        right = net.encode_image(torch.stack([prepare(picture) for picture in pictures]), normalize=True)
        words = net.encode_text(
            open_clip.get_tokenizer(model)(["a photo of star", "a photo of red key"]), normalize=True
        )
    assert (scorer.encode_images(pictures) * right).sum(1).min() > 0.999
    assert (
        torch.allclose(aux[:2], words, atol=1e-5)
        and scorer.tokenizer.context_length == config["text_cfg"]["context_length"]
    )
    bias = config.get("init_logit_bias", 0.0)
    assert torch.allclose(a, scorer.logit_scale * image.mean(0) @ aux.T + bias, atol=1e-4) and scorer.logit_bias == bias
    assert s.isfinite().all() and METHODS["bsap"](s, a, pairs).isfinite().all()

    retrieval = pytest.importorskip("bsap_utils.retrieval")
    index = retrieval.BalancedIndex.build(image.mean(0), aux, scorer.logit_scale, method="bsap")
    found = index.search(text[:3], k=2)[1]
    shifted = scorer.logit_scale * image.mean(0) @ text[:3].T - (a - bias).logsumexp(1)[:, None]
    assert (np.asarray(found)[:, 0] == shifted.argmax(0).numpy()).all()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_is_the_models_own(interpolation, tmp_path):
    preprocess = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.3, 0.2, 0.1],
        "interpolation": interpolation,
        "resize_mode": "squash",
    }
    model, net = save(tmp_path / "model", {"embed_dim": 16, "vision_cfg": TOWER, "text_cfg": TEXT}, preprocess)
    config = open_clip.transform.PreprocessCfg(**net.visual.preprocess_cfg)
    prepare = open_clip.transform.image_transform_v2(config, is_train=False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8))
    with torch.inference_mode():
        right = net.encode_image(prepare(picture)[None], normalize=True)
    found = ClipScorer(model, device="cpu", cache=False).encode_images([picture])
    assert (found - right).abs().max() < 2e-4  # the other interpolation is six times as far


# Names


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-B-33", "openai", "ViT-B-33 openai are not on this machine: give one of open_clip.list_pretrained"),
        (
            "ViT-B-32",
            "laion2b",
            "ViT-B-32 laion2b are not.*a checkpoint's path, or a folder with.*'local-dir:data/clip",
        ),
        ("ViT-B-32", "", "ViT-B-32  are not on this machine"),
        ("ViT-B-32", "checkpoints/mine.pt", "mine.pt are not on this machine.*a checkpoint's path"),
        ("local-dir:nowhere", "", "nowhere.*"),
    ],
)
def test_errors_name_what_is_wrong_and_what_to_do(model, pretrained, message):
    for function in (scoring.find_weights, lambda *names: ClipScorer(*names, device="cpu")):
        with pytest.raises(ModelError, match=message):
            function(model, pretrained)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:99", "mps:99"])
def test_a_device_that_there_is_not_is_named_and_the_model_is_not_blamed(device):
    with pytest.raises(ModelError, match=f"^Device '{device}' cannot be used here .*: take auto or cpu"):
        ClipScorer(scoring.SAMPLE_MODEL, device=device)


def test_devices_and_precisions():
    assert scoring.pick_device("cpu").type == "cpu" and scoring.pick_device().type in ("cuda", "mps", "cpu")
    assert ClipScorer(scoring.SAMPLE_MODEL, device="cpu").precision == "fp32"
    with pytest.raises(ModelError, match="fp23.*bf16"):
        ClipScorer(scoring.SAMPLE_MODEL, device="cpu", precision="fp23")


# Files


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(1)
    return open_clip.create_model(SMALL)


def test_a_checkpoint_file(plain, tmp_path):
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in plain.state_dict().items()}}, tmp_path / "mine.pt"
    )
    assert scoring.find_weights(SMALL, str(tmp_path / "mine.pt")) == tmp_path / "mine.pt"
    scorer = ClipScorer(SMALL, str(tmp_path / "mine.pt"), device="cpu")
    assert torch.equal(scorer.model.visual.conv1.weight, plain.visual.conv1.weight)
    same, other = (ClipScorer(SMALL, str(tmp_path / "mine.pt"), device="cpu") for _ in range(2))
    with torch.no_grad():
        next(other.model.parameters()).add_(1e-3)
    assert same.weights_hash == scorer.weights_hash != other.weights_hash


def test_a_folder_without_weights_and_damaged_weights(save_clip):
    with pytest.raises(ModelError, match="local-dir:.*could not be loaded: Required pretrained weights"):
        ClipScorer(f"local-dir:{save_clip(weights=False)}", device="cpu")
    folder = save_clip()
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="could not be loaded: .*header"):
        ClipScorer(f"local-dir:{folder}", device="cpu")


def test_a_checkpoint_that_holds_more_than_weights_is_not_run(plain, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was here",))

    torch.save({"epoch": Evil(), "state_dict": plain.state_dict()}, tmp_path / "mine.pt")
    with pytest.raises(ModelError, match="could not be loaded: it holds code or objects.*as safetensors"):
        ClipScorer(SMALL, str(tmp_path / "mine.pt"), device="cpu")
    assert not (tmp_path / "was here").exists()


@pytest.fixture
def with_twin(tmp_path, monkeypatch, save_clip):
    """Models "tiny" and "tiny-quickgelu" of open_clip, and the weights of the second."""
    config = json.loads((save_clip(weights=False) / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.json").write_text(json.dumps(config))
    (tmp_path / "configs/tiny-quickgelu.json").write_text(json.dumps({**config, "quick_gelu": True}))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS})
    open_clip.add_model_config(tmp_path / "configs")
    torch.manual_seed(0)
    return {key: value.contiguous() for key, value in open_clip.create_model("tiny-quickgelu").state_dict().items()}


@pytest.mark.parametrize("mark", ["half", "halves", "name"])
def test_openais_weights_in_a_file_are_never_computed_with_plain_gelu(mark, with_twin, tmp_path):
    state, file = with_twin, tmp_path / ("vitb32-OpenAI.safetensors" if mark == "name" else "weights.safetensors")
    if mark.startswith("hal"):
        state = {key: value.half() for key, value in state.items()}
    if mark == "halves":  # made in half precision, stored in single
        state = {key: value.float() for key, value in state.items()}
    save_file(state, file)
    with pytest.raises(ModelError, match="OpenAI's weights need the model 'tiny-quickgelu'"):
        ClipScorer("tiny", str(file), device="cpu")
    scorer = ClipScorer("tiny-quickgelu", str(file), device="cpu")
    assert type(scorer.model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_others_are_loaded_without_a_word(dtype, with_twin, tmp_path):
    save_file({key: value.to(dtype) for key, value in with_twin.items()}, tmp_path / "weights.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClipScorer("tiny", str(tmp_path / "weights.safetensors"), device="cpu")


@pytest.mark.parametrize("tag", ["openai", "metaclip_400m"])
def test_a_tag_under_the_plain_name_gets_the_quickgelu_that_it_was_trained_with(tag, with_twin, hub, monkeypatch):
    save_file(with_twin, hub[1] / "open_clip_model.safetensors")
    record = {"hf_hub": "local/tiny/", "quick_gelu": True, "mean": [0.5] * 3, "std": [0.5] * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {tag: record})
    scorer = ClipScorer("tiny", tag, device="cpu")
    assert type(scorer.model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


# The hub


@pytest.fixture
def hub(save_clip, tmp_path, monkeypatch):
    """A hub on this machine, which serves one repository as the real one does; counts its requests."""
    folder, requests = save_clip(), []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            file = folder / self.path.rpartition("/")[2]
            found = "/local/tiny/resolve/" in self.path and file.is_file()
            body = file.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            headers = (
                {"ETag": f'"{len(body)}"', "X-Repo-Commit": "a" * 40} if found else {"X-Error-Code": "EntryNotFound"}
            )
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in [name for name in os.environ if name.upper().endswith("_PROXY")]:
        monkeypatch.delenv(name)
    huggingface_hub.close_session()
    yield requests, folder
    server.shutdown()


def test_a_model_from_a_hub_and_then_from_its_cache_without_one(hub, tmp_path, monkeypatch):
    requests, folder = hub
    first = ClipScorer("hf-hub:local/tiny", device="cpu").encode_texts(["star"])
    assert any(path.endswith("open_clip_model.safetensors") for path in requests)
    assert scoring.find_weights("hf-hub:local/tiny").name == "open_clip_model.safetensors"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert torch.equal(ClipScorer("hf-hub:local/tiny", device="cpu").encode_texts(["star"]), first)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE, "the hub's client was left offline"
    shutil.copytree(tmp_path / "hub/models--local--tiny", tmp_path / "other/models--local--tiny", symlinks=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "other"))  # as we advise
    assert torch.equal(ClipScorer("hf-hub:local/tiny", device="cpu").encode_texts(["star"]), first)


def test_a_repository_that_is_not_there_is_an_error(hub):
    with pytest.raises(ModelError, match="hf-hub:local/absent .*could not be loaded"):
        ClipScorer("hf-hub:local/absent", device="cpu")


@pytest.mark.parametrize(
    ("names", "repository"),
    [
        (("ViT-B-32", "openai"), "timm/vit_base_patch32_clip_224.openai"),
        (("ViT-B-32", "laion2b_s34b_b79k"), "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        (("hf-hub:someone/some-clip",), "someone/some-clip"),
    ],
)
def test_without_a_hub_it_is_said_at_once_what_to_download(names, repository, hub, monkeypatch):
    """The hub's own client goes on trying for half a minute; ours asks once. Here a port counts who knocks."""
    knocks = []
    with socket.create_server(("127.0.0.1", 0)) as door:

        def hang_up():
            while True:
                try:
                    knocks.append(door.accept()[0])
                except OSError:
                    return
                knocks[-1].close()

        threading.Thread(target=hang_up, daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{door.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ModelError, match="cannot be reached.*hf download .*local-dir:data/clip-refshapes") as error:
            ClipScorer(*names, device="cpu")
        door.shutdown(socket.SHUT_RDWR)
    assert f"`hf download {repository}`" in str(error.value) and len(knocks) == 1 and time.monotonic() - start < 10


def test_a_tokenizer_that_is_not_here_is_said_at_once(with_twin, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    config = open_clip.get_model_config("tiny")
    config["text_cfg"]["hf_tokenizer_name"] = "timm/ViT-B-16-SigLIP2"
    folder = tmp_path / "configs/model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(with_twin, folder / "open_clip_model.safetensors")
    (tmp_path / "configs/own.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    for names in ((f"local-dir:{folder}",), ("own", str(folder / "open_clip_model.safetensors"))):
        start = time.monotonic()
        with pytest.raises(ModelError, match="or its tokenizer could not be loaded"):
            ClipScorer(*names, device="cpu")
        assert time.monotonic() - start < 10


@pytest.mark.parametrize(("name", "value"), [("ALL_PROXY", "socks5://127.0.0.1:1"), ("HTTPS_PROXY", "127.0.0.1:1")])
def test_a_network_that_is_set_up_wrongly_is_said_at_once(name, value, hub, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://huggingface.invalid")
    start = time.monotonic()
    with pytest.raises(ModelError, match="huggingface.invalid cannot be reached"):
        ClipScorer("ViT-B-32", "openai", device="cpu")
    assert time.monotonic() - start < 10


def test_offline_by_choice_asks_nobody(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="cannot be reached.*HF_HUB_OFFLINE"):
        ClipScorer("ViT-B-32", "openai", device="cpu")
    assert not hub[0]
