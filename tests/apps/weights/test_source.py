"""Getting upstream's code: every way, in its order, and every way it fails."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import shutil
import socket
import sys
import tempfile
import textwrap
import zipfile

import pytest

from dinov2_attn._download import TIMEOUT, Wheel, bounded_downloads, download, fetch_wheel
from dinov2_attn.apps.weights.source import DINOV2_WHEEL, from_checkout
from dinov2_attn.errors import UnavailableError, UnreadableFileError
from tests.support.subprocesses import OFFLINE, python

MODELS = "dinov2/models/vision_transformer.py"


@pytest.fixture(scope="module")
def wheel():
    return fetch_wheel(DINOV2_WHEEL)


@pytest.fixture(scope="module")
def checkout(wheel, tmp_path_factory):
    """A folder like a clone of upstream, as it was at the first commit."""
    folder = tmp_path_factory.mktemp("checkout")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    """An empty cache; gives the path at which the wheel is kept in it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "dinov2_attn" / "dinov2-0.0.1.dev2.whl"


@pytest.fixture
def offline(monkeypatch):
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)


def report(code, **kwargs):
    """Run ``code`` in a fresh process and return what it printed."""
    result = python("-c", textwrap.dedent(code), **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout


# The wheel and its cache


def test_a_foreign_file_in_the_cache_is_replaced_by_the_pinned_wheel(torch_home, monkeypatch):
    """Finished beside its place: elsewhere may be another disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(torch_home / "absent"))
    torch_home.parent.mkdir(parents=True)
    torch_home.write_bytes(b"not the wheel")
    assert fetch_wheel(DINOV2_WHEEL) == torch_home
    assert hashlib.sha256(torch_home.read_bytes()).hexdigest() == DINOV2_WHEEL.sha256
    assert list(torch_home.parent.iterdir()) == [torch_home]


def test_the_cached_wheel_needs_no_network(wheel, torch_home, offline):
    torch_home.parent.mkdir(parents=True)
    shutil.copy(wheel, torch_home)
    assert fetch_wheel(DINOV2_WHEEL) == torch_home


def test_a_wheel_with_another_digest_is_refused_and_not_kept(torch_home):
    pinned = Wheel("dinov2", "0.0.1.dev2", "0" * 64)
    with pytest.raises(
        UnavailableError, match=f"(?s)Expected .*{'0' * 64}.\nFound .*{DINOV2_WHEEL.sha256}"
    ):
        fetch_wheel(pinned)
    assert list(torch_home.parent.iterdir()) == []


def test_the_message_of_pip_is_shown(torch_home, offline):
    with pytest.raises(UnavailableError, match=r"(?s)No matching distribution found.*pip download"):
        fetch_wheel(DINOV2_WHEEL)
    assert list(torch_home.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("said", "found"), [("", "no output from pip"), ("one", "one"), ("one\ntwo\nthree\n", "three")]
)
def test_the_last_line_of_pip_is_shown(tmp_path, monkeypatch, said, found):
    pip = tmp_path / "python"
    pip.write_text(f"#!/bin/sh\nprintf {shlex.quote(said)} >&2\nexit 1\n")
    pip.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(UnavailableError, match=rf"Found {found}\.\nCheck that"):
        download(DINOV2_WHEEL.requirement, tmp_path)


def test_a_cache_that_cannot_be_written_names_torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match=r"(?s)Not a directory.*Set TORCH_HOME"):
        fetch_wheel(DINOV2_WHEEL)


@pytest.mark.parametrize("before", [None, 77.0])
def test_a_download_times_out_and_writes_nothing_to_standard_output(capsys, before):
    socket.setdefaulttimeout(before)
    try:
        with contextlib.suppress(OSError), bounded_downloads():
            print("10 %")
            assert socket.getdefaulttimeout() == TIMEOUT
            raise OSError("a broken line")
        assert socket.getdefaulttimeout() == before
    finally:
        socket.setdefaulttimeout(None)
    assert capsys.readouterr() == ("", "10 %\n")


# The ways and their order, each in its own process


def test_a_given_checkout_wins_over_an_installed_copy(checkout, tmp_path):
    shutil.copytree(checkout, tmp_path / "installed")
    printed = report(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path / "installed")!r})
        from dinov2_attn.apps.weights.source import obtain
        print(obtain({str(checkout)!r}))
        import dinov2
        print(dinov2.__file__)
        print(obtain({str(checkout)!r}).kind)
        print(obtain())
        try:
            obtain({str(tmp_path / "installed")!r})
        except Exception as error:
            print(error)
        """,
        cwd=tmp_path,
    )
    first, file, again, unnamed, *error = printed.splitlines()
    assert first == f"upstream's code is {checkout} (checkout)"
    assert file == str(checkout / "dinov2" / "__init__.py")
    assert again == "checkout"
    assert unnamed == f"upstream's code is {checkout / 'dinov2'} (installed)"
    assert error[0] == f"Expected dinov2 of {tmp_path / 'installed'}."
    assert error[1] == f"Found this process has imported {file} already."
    assert error[2].startswith("Choose the source before")


def test_a_folder_that_was_imported_in_its_place_is_named(checkout, tmp_path):
    """A clone seen from above: Python takes any folder of the name, and it has no file."""
    (tmp_path / "dinov2").mkdir()
    printed = report(
        f"""
        import dinov2
        from dinov2_attn.apps.weights.source import obtain
        try:
            obtain({str(checkout)!r})
        except Exception as error:
            print(error)
        """,
        cwd=tmp_path,
    )
    expected = f"this process has imported {tmp_path / 'dinov2'} already.\nChoose the source"
    assert expected in printed


def test_a_checkout_that_fails_to_import_leaves_nothing_behind(checkout, tmp_path):
    shutil.copytree(checkout, tmp_path / "broken")
    (tmp_path / "broken" / MODELS).write_text("import dinov2.layers\nraise OSError('broken')\n")
    printed = report(
        f"""
        import sys
        from dinov2_attn.apps.weights.source import obtain
        before = list(sys.path)
        try:
            obtain({str(tmp_path / "broken")!r})
        except Exception as error:
            print(error)
        print(sys.path == before, any(name.startswith("dinov2.") for name in sys.modules))
        print(obtain({str(checkout)!r}).kind)
        """,
        cwd=tmp_path,
    )
    *error, traces, fixed = printed.splitlines()
    assert "Found OSError: broken." in error
    assert traces == "True False"
    assert fixed == "checkout"


def test_code_that_install_refuses_is_an_error(checkout, tmp_path):
    shutil.copytree(checkout, tmp_path / "altered")
    attention = tmp_path / "altered" / "dinov2" / "layers" / "attention.py"
    attention.write_text(attention.read_text().replace("softmax(dim=-1)", "sigmoid()"))
    printed = report(
        f"""
        import sys
        sys.path.append({str(tmp_path / "altered")!r})
        sys.modules["xformers"] = None  # its branch is as it was
        import dinov2_attn
        from dinov2_attn.apps.weights.source import obtain
        dinov2_attn.install()
        try:
            obtain()
        except dinov2_attn.errors.IncompatibleUpstreamError:
            print("dinov2.layers.attention" in sys.modules)
        """,
        cwd=tmp_path,
    )
    assert printed == "False\n"


def test_the_copy_of_torch_hub_is_used_offline_and_before_the_wheel(checkout, tmp_path):
    copy = tmp_path / "hub" / "facebookresearch_dinov2_main"
    shutil.copytree(checkout, copy)
    # A clone seen from above: a folder of the right name that is no package.
    (tmp_path / "dinov2" / "dinov2").mkdir(parents=True)
    printed = report(
        """
        from dinov2_attn.apps.weights.source import obtain
        print(obtain())
        """,
        cwd=tmp_path,
        **OFFLINE,
        TORCH_HOME=tmp_path,
    )
    assert printed == f"upstream's code is {copy} (hub)\n"


def test_the_copy_of_torch_hub_is_downloaded_without_a_prompt(checkout, tmp_path):
    """By torch.hub itself: GitHub is what answers, and all that it is asked for."""
    top = "facebookresearch-dinov2-0123456"
    with zipfile.ZipFile(tmp_path / "answer.zip", "w") as archive:
        archive.writestr(f"{top}/", "")
        archive.writestr(f"{top}/hubconf.py", "dependencies = ['torch']")
        for file in (checkout / "dinov2").rglob("*.py"):
            archive.write(file, f"{top}/{file.relative_to(checkout)}")
    printed = report(
        """
        import urllib.request
        from email.message import Message
        from urllib.response import addinfourl

        asked = []

        class GitHub(urllib.request.HTTPSHandler):
            def https_open(self, request):
                asked.append(request.full_url)
                answer = addinfourl(open("answer.zip", "rb"), Message(), request.full_url, 200)
                answer.msg = "OK"
                return answer

        urllib.request.install_opener(urllib.request.build_opener(GitHub))
        from dinov2_attn.apps.weights.source import obtain
        print(obtain(), *asked, sep="\\n")
        """,
        cwd=tmp_path,
        TORCH_HOME=tmp_path,
    )
    copy = tmp_path / "hub" / "facebookresearch_dinov2_main"
    assert printed.splitlines() == [
        f"upstream's code is {copy} (hub)",
        "https://github.com/facebookresearch/dinov2/zipball/main",
    ]


def test_the_wheel_comes_last_and_its_licence_is_logged(wheel, tmp_path):
    cached = tmp_path / "hub" / "dinov2_attn" / "dinov2-0.0.1.dev2.whl"
    cached.parent.mkdir(parents=True)
    shutil.copy(wheel, cached)
    printed = report(
        """
        import inspect, logging, sys
        logging.getLogger("dinov2_attn").addHandler(logging.StreamHandler(sys.stdout))
        from dinov2_attn.apps.weights.source import obtain
        print(obtain())
        from dinov2.layers.attention import Attention
        print("self.qkv(x)" in inspect.getsource(Attention.forward))
        """,
        cwd=tmp_path,
        **OFFLINE,
        TORCH_HOME=tmp_path,
    )
    licence, *rest = printed.splitlines()
    assert licence.startswith("using the wheel dinov2==0.0.1.dev2 from PyPI: ")
    assert "CC-BY-NC 4.0" in licence
    assert rest == [f"upstream's code is {cached} (pypi)", "True"]


def test_without_any_source_the_error_lists_all(tmp_path):
    printed = report(
        """
        import logging, sys
        log = logging.getLogger("dinov2_attn")
        log.addHandler(logging.StreamHandler(sys.stdout))
        log.setLevel("DEBUG")
        from dinov2_attn.apps.weights.source import obtain
        try:
            obtain()
        except Exception as error:
            print(type(error).__name__, error)
        """,
        cwd=tmp_path,
        **OFFLINE,
        TORCH_HOME=tmp_path,
    )
    *lines, expected, found, hint = printed.splitlines()
    reasons = [line for line in lines if line.startswith("no ")]
    starts = [
        "no importable dinov2 on the Python path (ModuleNotFoundError",
        "no copy of GitHub's through torch.hub (URLError",
        "no dinov2==0.0.1.dev2 from PyPI through pip (ERROR: No matching",
    ]
    assert all(reason.startswith(start) for reason, start in zip(reasons, starts, strict=True))
    assert expected == "UnavailableError Expected upstream's dinov2 code from one of three places."
    assert found == f"Found {'; '.join(reasons)}."
    assert "--repo PATH" in hint


@pytest.mark.parametrize("inside", [None, "dinov2"])
def test_a_folder_that_is_no_checkout_is_an_error(tmp_path, checkout, inside):
    folder = tmp_path if inside is None else checkout / inside
    with pytest.raises(
        UnreadableFileError, match=rf"(?s)Expected a checkout.*\.\nFound {folder}.*git clone"
    ):
        from_checkout(folder)
