"""The routes to an environment agree, and nothing of one machine is in the repository."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bsap_utils import ROOT, __version__, cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch", "open_clip_torch": "open-clip-torch", "ray": "ray-data"}
ONLY_ON_PIP = {"playwright>=1.45", "jupyter-bbox-widget>=0.7", "latex2mathml>=3.77", "lazy_loader>=0.4"}
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
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
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


def test_pip_install_brings_the_command_and_all_that_the_package_imports():
    (command,) = (e for e in metadata.entry_points(group="console_scripts") if e.name == "bsap")
    assert PROJECT["scripts"] == {"bsap": command.value} and command.load() is cli.app
    extras = PROJECT["optional-dependencies"]
    ours = {
        Requirement(r).name.lower() for r in PROJECT["dependencies"] + extras["sam"] + extras["scale"] + extras["parse"]
    }
    others = {
        "jupyter_client": "papermill's",
        "nbformat": "nbconvert's",
        "IPython": "ipywidgets'",
    }
    homes = {
        "PIL": "pillow",
        "jupyter_bbox_widget": "jupyter-bbox-widget",
        "skimage": "scikit-image",
        "yaml": "pyyaml",
        "open_clip": "open_clip_torch",
        "faiss": "faiss-cpu",
    }
    for file in sorted((ROOT / "bsap_utils").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, *others, "bsap_utils"}:
                assert homes.get(name, name).lower() in ours, (
                    f"{file.name} imports {name}, which pyproject.toml does not name"
                )


def make(*goals: str, cwd=ROOT) -> str:
    """What make would do, without doing it."""
    return subprocess.run(["make", "-n", *goals], cwd=cwd, capture_output=True, text=True, check=True).stdout


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


@needs_make
def test_make_sets_up_with_what_this_test_compares(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    pip = "--constraint constraints.txt --editable"
    for goal in ("setup", "figures", "test", "lab", "lint"):
        assert f"{pip} '.'" in make(goal, cwd=tmp_path), goal
        assert (f"{pip} '.[test]'" in make(goal, cwd=tmp_path)) == (goal in ("test", "lint")), goal


PYTHONS = SpecifierSet(PROJECT["requires-python"])


@needs_make
def test_the_dev_container_sets_up_as_everyone_does():
    folder = ROOT / ".devcontainer"
    container = json.loads((folder / "devcontainer.json").read_text())
    image = (folder / container["build"]["dockerfile"]).read_text()
    (python,) = re.findall(r"^FROM python:(3\.[0-9]+)\.[0-9]+-bookworm$", image, re.MULTILINE)  # a tag that stays
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert python in PYTHONS and f"python={python}" in environment
    assert container["remoteUser"] in image and "USER root" not in image  # JupyterLab refuses to run as root
    goal, doctor = container["postCreateCommand"].split(" && ")
    assert make(*goal.split()[1:]) is not None and goal.split()[0] == "make"
    assert doctor.split()[0] == ".venv/bin/bsap" and doctor.split()[1] in cli.app.commands
    (port,) = container["forwardPorts"]
    assert port == 8888 and str(port) in container["portsAttributes"]  # JupyterLab's own, which `make lab` leaves


WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
STEPS = {name: job["steps"] for name, job in WORKFLOW["jobs"].items()}


@needs_make
def test_the_workflow_runs_what_the_readme_says():
    assert [step["run"] for step in STEPS["ci"] if "run" in step] == [".ci/run"] and os.access(
        ROOT / ".ci/run", os.X_OK
    )
    for steps in STEPS.values():
        (python,) = (step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", ""))
        assert isinstance(python, str) and python in PYTHONS  # 3.10 without quotes is the number 3.1
        for step in steps:
            for goals in re.findall(r"^make (.+)$", step.get("run", ""), re.MULTILINE):
                make(*goals.split())
    uploads = [step["with"]["path"].split() for step in STEPS["notebook"] if "upload-artifact" in step.get("uses", "")]
    assert uploads == [["runs", "figures/by-hand"]]


def test_actions_are_named_by_commit():
    used = [step["uses"] for steps in STEPS.values() for step in steps if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", one) for one in used)


def test_what_is_typed_into_the_workflow_is_never_run(tmp_path):
    for step in (step for steps in STEPS.values() for step in steps):
        assert "${{" not in step.get("run", ""), "an input would become part of the script: hand it over in env"
    (step,) = (step for step in STEPS["notebook"] if "NOTEBOOK" in step.get("env", {}))
    inputs = WORKFLOW[True]["workflow_dispatch"]["inputs"]  # YAML 1.1 reads the key `on` as true
    assert step["env"] == {name.upper(): f"${{{{ inputs.{name} }}}}" for name in inputs}
    command = tmp_path / ".venv/bin/bsap"
    command.parent.mkdir(parents=True)
    command.write_text(
        f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open('given', 'w'))\nsys.exit('4' in sys.argv)\n"
    )
    command.chmod(0o755)

    def run(notebook: str, parameters: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "NOTEBOOK": notebook, "PARAMETERS": parameters}
        return subprocess.run(
            ["bash", "-eo", "pipefail", "-c", step["run"]], cwd=tmp_path, env=env, capture_output=True
        )

    assert run("03; touch evil", "-p A '$(touch evil)' -p B \"x y\" `touch evil` *; touch evil").returncode == 0
    given = json.loads((tmp_path / "given").read_text())
    assert given[:8] == ["run", "03; touch evil", "--name", "by-hand", "-p", "A", "$(touch evil)", "-p"]
    assert given[8:] == ["B", "x y", "`touch", "evil`", "*;", "touch", "evil"]
    assert not (tmp_path / "evil").exists()
    assert run("03", inputs["parameters"]["default"]).returncode == 0
    assert json.loads((tmp_path / "given").read_text())[4:] == ["-p", "SPLIT", "val"]
    assert run("03", "").returncode == 0 and run("03", "-p A 4").returncode != 0  # a notebook that fails fails the job


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
