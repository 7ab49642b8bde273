"""Features that were computed once: of regions and texts, on disk, so that a second run encodes nothing.

A *space* is a folder for everything that one model gives under one set of conditions. Each call of `put` adds a shard to
it: `<name>.safetensors` with the features and `<name>.parquet` with their keys, rows and the shard's digest. A shard is
never changed, has a name of its own and appears by renaming, the index after the features: two runs at once, or a killed
one, leave nothing half-written. What no longer agrees with its digest is thrown away, computed again, and said.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch

from . import ROOT


def folder() -> Path | None:
    """Return where features are kept: `BSAP_CACHE` where that is set (empty: nowhere, None), else data/cache of the clone."""
    given = os.environ.get("BSAP_CACHE", ROOT / "data/cache")
    return Path(given) if given != "" else None


def key_of(*parts: Any) -> str:
    """Return 32 hexadecimal digits for anything that JSON can write; equal for equal parts only.

    >>> key_of("crop", [1.0, 2.0]) == key_of("crop", [1.0, 2.0]), key_of("ab", "c") == key_of("a", "bc")
    (True, False)
    """
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


def usage() -> tuple[int, int]:
    """Return how many files the cache has and how many bytes they take."""
    here = folder()
    files = [path for path in here.rglob("*") if path.is_file()] if here and here.is_dir() else []
    return len(files), sum(path.stat().st_size for path in files)


def clear() -> tuple[int, int]:
    """Delete the cache's shards, unfinished ones too: (files, bytes). Anything else in its folder stays."""
    here, count, size = folder(), 0, 0
    for path in sorted(here.glob("*/*")) if here else []:
        if path.suffix in (".safetensors", ".parquet", ".part", ".json"):
            count, size = count + 1, size + path.stat().st_size
            path.unlink(missing_ok=True)
    for space in here.glob("*/") if here else []:
        if not any(space.iterdir()):
            space.rmdir()
    return count, size


class Space:
    """The features that one model gives under one set of conditions, `about`, found by key, in a folder of `cache`.

    >>> import tempfile
    >>> space = Space(Path(tempfile.mkdtemp()), {"model": "ViT-B-32"})
    >>> space.put(["a", "b"], torch.eye(2))
    >>> features, known = space.get(["b", "c"])
    >>> features[known], known
    (tensor([[0., 1.]]), tensor([ True, False]))
    """

    def __init__(self, cache: Path, about: dict[str, Any]) -> None:
        self.path, self.about = cache / key_of(about), about
        self._index: dict[str, pd.DataFrame] = {}  # by shard: key, row, digest

    def get(self, keys: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features [N, D] of N keys, and which of them are known [N] bool; the rows of the others are NaN.

        A damaged shard is removed and a warning says what was lost.
        """
        names = {path.stem for path in self.path.glob("*.parquet")}
        self._index = {name: index for name, index in self._index.items() if name in names}
        for name in sorted(names - set(self._index)):
            try:
                index = pd.read_parquet(self.path / f"{name}.parquet", page_checksum_verification=True)
                self._index[name] = index[["key", "row", "digest"]]
            except Exception as error:  # pyarrow raises nearly anything on damaged bytes
                self._remove(name, error)
        known = torch.zeros(len(keys), dtype=torch.bool)
        features = torch.zeros(0, 0)
        for name, index in list(self._index.items()):
            place = pd.Index(index["key"]).get_indexer(pd.Index(keys, dtype=object))
            here = torch.from_numpy(place >= 0) & ~known
            if not here.any():
                continue
            try:
                content = (self.path / f"{name}.safetensors").read_bytes()
                if hashlib.blake2b(content, digest_size=16).hexdigest() != index["digest"].iloc[0]:
                    raise ValueError("its bytes are not those that were written")
                shard = safetensors.torch.load(content)["features"]
                rows = shard[torch.from_numpy(index["row"].to_numpy()[place[here.numpy()]])]
            except Exception as error:
                self._remove(name, error)
                continue
            if not known.any():
                features = torch.full((len(keys), rows.shape[1]), torch.nan)
            features[here] = rows
            known |= here
        return (features if known.any() else torch.full((len(keys), 0), torch.nan)), known

    def put(self, keys: Sequence[str], features: torch.Tensor) -> None:
        """Keep features [N, D] under N keys. A cache that cannot be written is a warning: the run goes on without."""
        name = uuid.uuid4().hex
        content = safetensors.torch.save({"features": features.contiguous()})
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
        index = pd.DataFrame({"key": list(keys), "row": np.arange(len(keys)), "digest": digest})
        index = index.drop_duplicates("key")  # candidates may hold the same region twice
        about, shard, table = (self.path / end for end in ("about.json", f"{name}.safetensors", f"{name}.parquet"))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not about.exists():
                _write(about, json.dumps(self.about, indent=1, default=str).encode())
            _write(shard, content)
            _write(table, index.to_parquet(index=False, write_page_checksum=True))
        except OSError as error:
            warnings.warn(f"{self.path}: features could not be kept ({error}); the next run encodes them again. "
                          "Free some space, or set BSAP_CACHE to another folder.", stacklevel=2)  # fmt: skip
        else:
            self._index[name] = index

    def _remove(self, name: str, error: Exception) -> None:
        lost = len(self._index.pop(name, ()))
        for end in ("parquet", "safetensors"):
            (self.path / f"{name}.{end}").unlink(missing_ok=True)
        warnings.warn(f"{self.path / name}.safetensors: this part of the feature cache is damaged ({error}) and was removed; "
                      f"its {lost or 'unknown number of'} features are encoded again.", stacklevel=3)  # fmt: skip


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content)
    part.replace(path)
