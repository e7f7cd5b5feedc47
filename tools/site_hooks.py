"""Hooks of mkdocs.yml: pages and links that differ between the site and GitHub.

On GitHub ``docs/`` is read as it is. The site also has README.md as its first page, CHANGELOG.md,
and a reference from docstrings. Links to files outside of ``docs/`` lead to the repository.
"""

from __future__ import annotations

import ast
import os.path
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "dinov2_attn"

# Pages of the site that are files of the repository elsewhere.
ELSEWHERE = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}
# Modules whose public names have a page of their own.
MODULES = ("viz", "errors", "typing")

# Methods of protocols are overloads, which only their source shows.
OPTIONS = {"dinov2_attn.typing": "    options: { show_source: true, members: false }\n"}

# Code first: what looks like a link there is none.
LINK = re.compile(r"^```.*?^```|`[^`\n]*`|\]\((?P<target>[^)\s]+)\)", re.S | re.M)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in ``docs/``."""
    for name, source in ELSEWHERE.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, name, content=text))
    for module in MODULES:
        text = _page_of_module(module)
        files.append(File.generated(config, f"reference/{module}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links where the site has their target, and add docstrings to the API."""
    name: str = page.file.src_uri
    if name == "api.md":
        names = [name for name in public_names("__init__") if name not in MODULES]
        markdown += "\n## Functions and classes\n\n" + _directives("dinov2_attn", names)
    folder = "" if name in ELSEWHERE else "docs"
    return LINK.sub(lambda found: _led(found, folder, config.extra["repository"]), markdown)


def on_post_build(config: Any) -> None:
    """Publish llms.txt, with the addresses of the files that it names."""
    text = (ROOT / "llms.txt").read_text("utf-8")
    text = LINK.sub(lambda found: _led(found, "", config.extra["repository"], site=False), text)
    Path(config.site_dir, "llms.txt").write_text(text, "utf-8")


def public_names(module: str) -> list[str]:
    """Return what a module has for users: ``__all__``, or else its public classes.

    The module is read and not imported, since that would need torch.
    """
    body = ast.parse((PACKAGE / f"{module}.py").read_text("utf-8")).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    classes = [node.name for node in body if isinstance(node, ast.ClassDef)]
    return [name for name in classes if not name.startswith("_")]


def _page_of_module(module: str) -> str:
    path = f"dinov2_attn.{module}"
    return f"# {path}\n\n{_directives(path, public_names(module))}"


def _directives(path: str, names: list[str]) -> str:
    return "\n".join(f"::: {path}.{name}\n{OPTIONS.get(path, '')}" for name in names)


def _led(found: re.Match[str], folder: str, repository: str, site: bool = True) -> str:
    target = found["target"]
    if target is None or "://" in target or target.startswith("#"):
        return found[0]
    path, hash_, anchor = target.partition("#")
    path = os.path.normpath(f"{folder}/{path}" if folder else path)
    return f"]({_address(path, repository, site)}{hash_}{anchor})"


def _address(path: str, repository: str, site: bool) -> str:
    pages = {source: page for page, source in ELSEWHERE.items()}
    if site and path in pages:
        return pages[path]
    if site and path.startswith("docs/"):
        return path.removeprefix("docs/")
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{repository}/{kind}/main/{path}"
