"""What git is asked of a clone, on small ones made here, and what becomes of its errors."""

from __future__ import annotations

import shutil
import tarfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dinov2_attn.errors import UnavailableError
from dinov2_attn.proof.verify import git
from dinov2_attn.proof.verify.git import Repository, is_bare
from tests.proof.test_verify import git as run

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="no git here")


@pytest.fixture
def clone(tmp_path):
    run(tmp_path, "init", "-q", "-b", "main", "clone")
    return Repository(str(tmp_path / "clone"))


@pytest.fixture
def commit(clone, monkeypatch):
    """Commit files by their names, on a day of January 2024."""

    def commit(day=1, **files):
        for name, text in files.items():
            path = Path(clone.folder, name.replace("__", "/"))
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"2024-01-{day:02}T12:00:00Z")
        run(clone.folder, "add", "-A")
        run(clone.folder, "commit", "--allow-empty", "-qm", "a change")
        return run(clone.folder, "rev-parse", "HEAD")

    return commit


def test_parents_come_before_children_at_any_dates(clone, commit):
    """A clock that was wrong at the first commit, and two branches from there."""
    first = commit(day=9)
    ours = commit(day=5)
    run(clone.folder, "checkout", "-q", "-b", "branch", first)
    theirs = commit(day=2)
    run(clone.folder, "merge", "-q", "--no-edit", "main")
    merged = run(clone.folder, "rev-parse", "HEAD")
    assert clone.commits("all") == [first, theirs, ours, merged]
    assert clone.commits("main") == [ours]
    assert [clone.date(name) for name in (first, ours)] == ["2024-01-09", "2024-01-05"]
    for several in ("main..branch", "--all", "absent"):
        with pytest.raises(UnavailableError, match=r"(?s)an answer to git .* rev-parse"):
            clone.commits(several)


def test_commits_with_the_same_folders_have_one_fingerprint(clone, commit):
    folders = ["code", "-r"]
    first = commit(code__a="1", beside="1")
    beside = commit(beside="2")
    inside = commit(code__a="2")
    dashed = commit(**{"-r": "1"})
    one, same, other, last = (
        clone.fingerprint(name, folders) for name in (first, beside, inside, dashed)
    )
    assert one == same
    assert len({one, other, last}) == 3


def test_a_file_of_any_name_is_read_by_its_path(clone, commit):
    name = commit(code__a="text", **{"-d": "dashed"})
    assert clone.read(name, "code/a") == "text"
    assert clone.read(name, "-d") == "dashed"
    assert clone.read(name, "-r") is None


def test_a_clone_is_made_in_the_folder_given_for_it(clone, commit, tmp_path, monkeypatch):
    name = commit(a="1")
    scratch, elsewhere = tmp_path / "scratch", tmp_path / "elsewhere"
    for folder in (scratch, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(elsewhere)
    made = Repository.at(f"file://{clone.folder}", scratch)
    assert made.commits("HEAD") == [name]
    assert [str(path) for path in scratch.iterdir()] == [made.folder]
    assert not list(elsewhere.iterdir())
    assert [is_bare(Path(folder)) for folder in (made.folder, clone.folder)] == [True, False]


def test_a_bare_clone_is_known_by_what_is_in_it_and_what_is_not(tmp_path):
    head, objects, working = (tmp_path / name for name in ("HEAD", "objects", ".git"))
    head.touch()
    assert not is_bare(tmp_path)
    objects.mkdir()
    assert is_bare(tmp_path)
    working.mkdir()
    assert not is_bare(tmp_path)
    working.rmdir()
    head.unlink()
    assert not is_bare(tmp_path)


@pytest.mark.skipif(
    not hasattr(tarfile, "data_filter"), reason="this Python unpacks whatever it is"
)
def test_a_link_to_a_path_outside_the_commit_is_refused(clone, commit, tmp_path):
    Path(clone.folder, "out").symlink_to(tmp_path / "secret")
    name = commit(a="1")
    with pytest.raises(
        UnavailableError, match=rf"(?s)a commit whose .*\.\nFound {name}, where 'out' is a link"
    ):
        clone.unpack(name, tmp_path / "unpacked")


# What git says, or does not


def test_the_last_line_of_git_is_shown(tmp_path):
    """In whatever encoding: git repeats what it was given."""
    with pytest.raises(
        UnavailableError, match=r"(?s)git clone --quiet .*/absent/.*' does not exist\.\nName"
    ):
        Repository.at("/absent/\udcff", tmp_path)


def test_a_git_that_hangs_is_stopped(clone, monkeypatch):
    monkeypatch.setattr(git, "_SECONDS", 0.0)
    with pytest.raises(UnavailableError, match="timed out after 0.0 seconds"):
        clone.commits("HEAD")


def test_without_git_it_is_named(clone, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="No such file or directory: 'git'"):
        clone.commits("HEAD")


def test_git_never_prompts_for_a_password(tmp_path, monkeypatch):
    """Git gets an empty password and is refused. It does not wait for input."""
    for name in ("GIT_ASKPASS", "SSH_ASKPASS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.send_header("WWW-Authenticate", "Basic")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        Thread(target=http.serve_forever, daemon=True).start()
        with pytest.raises(UnavailableError, match="Found fatal: Authentication failed"):
            Repository.at(f"http://127.0.0.1:{http.server_port}/fork", tmp_path)
        http.shutdown()
