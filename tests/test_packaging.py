"""The routes to an environment agree, and nothing of one machine is in the repository."""

import re
import subprocess
import sys
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement

from bsap_utils import ROOT, __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch", "open_clip_torch": "open-clip-torch", "ray": "ray-data"}
ONLY_ON_PIP = {"playwright>=1.45"}
OWNER_REQUIRES = {"jupyterlab", "torch", "open_clip_torch", "pandas", "seaborn", "pycocotools", "papermill"}


def test_what_the_owner_requires_is_required():
    assert {Requirement(r).name for r in PROJECT["dependencies"]} >= OWNER_REQUIRES
    assert PROJECT["name"] == "bsap-utils" and PROJECT["version"] == __version__ == metadata.version("bsap-utils")


def test_environment_yml_has_the_packages_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [r for r in environment["dependencies"] if isinstance(r, str)]
    pip = next(r["pip"] for r in environment["dependencies"] if isinstance(r, dict))
    assert (
        environment["channels"][0] == "conda-forge"
        and "python=3.11" in conda
        and set(pip) == {"--editable .", *ONLY_ON_PIP}
    )
    ours = [Requirement(r) for r in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]
    wanted = {f"{CONDA_NAMES.get(r.name, r.name)}{r.specifier}" for r in ours}
    assert wanted - ONLY_ON_PIP == set(conda) - {"python=3.11", "pip"}


def test_constraints_are_exact_and_complete():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.\-]+", line), (
            f"constraints.txt: {line!r} is not name==version"
        )
        name, version = line.split("==")
        pinned[re.sub(r"[-_.]+", "-", name).lower()] = version
    extras = [r for names in PROJECT["optional-dependencies"].values() for r in names]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        assert requirement.specifier.contains(pinned[re.sub(r"[-_.]+", "-", requirement.name).lower()]), requirement


def test_nothing_of_this_machine_is_committed():
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    hosts = re.compile(rb"pypi\.org|pythonhosted\.org|registry\.npmjs|deb\.debian")
    paths = re.compile(rb"/(?:work|root)/[a-z.]+/")
    for name in filter(None, listed.split("\0")):
        file = ROOT / name
        if not file.is_file() or name == "tests/test_packaging.py":
            continue
        content = file.read_bytes()
        assert len(content) <= 10e6, f"{name} is over 10 MB"
        if b"\0" not in content[:8000]:
            assert not hosts.search(content), f"{name} names a package registry"
            assert not paths.search(content), f"{name} has a path of one machine"
