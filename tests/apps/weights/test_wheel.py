"""The wheel is what users get: what is in it, and that it needs PyTorch alone."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

import pytest

import dinov2_attn
from tests.programs import smoke
from tests.support import subprocesses, upstreams

ROOT = Path(__file__).parents[3]
UPSTREAM = upstreams.fetch_wheel(upstreams.FIRST.wheel)

# What Python runs when it starts: as if the extras were not installed. None is its own sign.
WITHOUT_EXTRAS = f"import sys; sys.modules.update(dict.fromkeys({smoke.OPTIONAL}))\n"


def build(source, folder, *options):
    """Build in this environment, so that no registry is needed for the build backend."""
    done = subprocesses.python("-m", "hatchling", "build", "-d", folder, *options, cwd=source)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(dist):
    (file,) = dist.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def unpacked(dist, tmp_path_factory):
    """The source distribution as a folder."""
    (file,) = dist.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("sdist")
    # Python 3.14 filters by itself, earlier ones warn; not every 3.10 knows of it.
    options = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    shutil.unpack_archive(file, folder, **options)
    return folder / file.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with the wheel, installed by pip."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocesses.python(
        "-m", "pip", "install", *options, "--target", folder, wheel, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def user(site, tmp_path_factory):
    """Run Python as one who has this interpreter's PyTorch and the wheel, and no extras."""
    startup = tmp_path_factory.mktemp("startup")
    (startup / "sitecustomize.py").write_text(WITHOUT_EXTRAS)
    path = os.pathsep.join(map(str, (site, startup, UPSTREAM)))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return lambda *arguments: subprocesses.python(*arguments, cwd=elsewhere, PYTHONPATH=path)


def files_in(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path for path in files if "__pycache__" not in path.parts}


def contents(wheel):
    return {member.filename: member.CRC for member in ZipFile(wheel).infolist()}


def test_the_wheel_holds_the_package_and_no_more(wheel):
    about = f"dinov2_attn-{dinov2_attn.__version__}.dist-info/"
    names = set(ZipFile(wheel).namelist())
    described = {name for name in names if name.startswith(about)}
    source = ROOT / "src"
    assert names - described == {
        path.relative_to(source).as_posix() for path in files_in(source / "dinov2_attn")
    }
    parts = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
    assert described == {about + part for part in parts}


def test_the_model_that_ships_is_in_the_wheel_with_its_card(wheel):
    """The weights byte for byte, and at what the package may grow by."""
    sizes = {member.filename: member.compress_size for member in ZipFile(wheel).infolist()}
    folder = "dinov2_attn/apps/demo/"
    shipped = ZipFile(wheel).read(f"{folder}model.safetensors")
    assert shipped == (ROOT / "src" / folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(shipped).hexdigest() in ZipFile(wheel).read(
        f"{folder}MODEL_CARD.md"
    ).decode("utf-8")
    assert sum(size for name, size in sizes.items() if name.startswith(folder)) <= 1_500_000


def test_the_core_asks_for_pytorch_alone(site):
    (installed,) = metadata.distributions(path=[str(site)])
    required = installed.requires or []
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.0"]


def test_the_sdist_is_the_repository(unpacked):
    if not (ROOT / ".git").exists():
        pytest.skip("no clone to compare with: it is an sdist that is under test")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    tracked = {name for name in listed.stdout.decode().split("\0") if (ROOT / name).is_file()}
    packed = {path.relative_to(unpacked).as_posix() for path in files_in(unpacked)}
    assert tracked - packed == set()
    assert not [name for name in packed if name.endswith((".pyc", ".pth", ".whl"))]


def test_the_sdist_builds_the_same_wheel(unpacked, wheel, tmp_path):
    build(unpacked, tmp_path, "-t", "wheel")
    assert contents(tmp_path / wheel.name) == contents(wheel)


def test_it_works_without_the_extras(user, site):
    done = user(smoke.__file__, site)
    assert done.returncode == 0, done.stderr


def test_its_program_runs(user, site):
    done = user(site / "bin" / "dinov2-attn", "doctor")
    assert done.returncode == 0, done.stderr
    assert f"dinov2-attn {dinov2_attn.__version__}" in done.stdout
    assert f"upstream's code is {UPSTREAM}" in done.stdout
    assert "attention and blocks as in " in done.stdout
    assert "xFormers on cpu: ModuleNotFoundError" in done.stdout


@pytest.mark.parametrize("command", ["heatmap --example --random-weights", "demo --seed 3"])
def test_pictures_name_the_extra_they_need(user, site, command):
    done = user("-m", "dinov2_attn", *command.split(), "-o", "out")
    assert done.returncode == 2
    assert "Found no torchvision in this environment.\n  Install" in done.stderr
    assert "dinov2-attn[viz]" in done.stderr


def test_its_conformance_suite_proves_upstream(user, site):
    # A plugin of zarr's imports NumPy, which is hidden here.
    options = [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:zarr",
        f"--dinov2={UPSTREAM}",
        f"--rootdir={site}",
    ]
    done = user("-m", "pytest", "--pyargs", "dinov2_attn.conformance", *options)
    assert done.returncode == pytest.ExitCode.OK, done.stdout + done.stderr
    assert f"proving dinov2 at {UPSTREAM}" in done.stdout
    assert f"{site.name}/dinov2_attn/proof/conformance/test_faithful.py ." in done.stdout
