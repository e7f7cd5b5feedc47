"""mkdocs.yml: the site builds without a warning and has an entry for every public name."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
import yaml

import dinov2_attn
from dinov2_attn import errors, typing, viz
from tests.project.test_project_files import PROJECT, ROOT

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
MODULES = {"viz", "errors", "typing"}
LIBRARIES = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")


def names_of(page):
    """Return the public names that ``page`` of the site documents."""
    if page == "api":
        return {f"dinov2_attn.{name}" for name in set(dinov2_attn.__all__) - MODULES}
    if page == "reference/errors":
        classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
        return {f"dinov2_attn.errors.{name}" for name in classes}
    module = {"reference/viz": viz, "reference/typing": typing}[page]
    return {f"{module.__name__}.{name}" for name in module.__all__}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    lacking = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if lacking:
        pytest.skip(f"{', '.join(lacking)} not installed: pip install 'dinov2-attn[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        # Not --quiet: with it warnings are not counted.
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def read(site, page):
    return (site / page / "index.html").read_text("utf-8")


@pytest.mark.parametrize("page", ["api", "reference/viz", "reference/errors", "reference/typing"])
def test_every_public_name_has_an_entry(page, site):
    found = set(re.findall(r'<h3 id="([\w.]+)"', read(site, page)))
    assert "dinov2_attn.errors.Dinov2AttnError" in names_of("reference/errors")
    assert found == names_of(page)


def test_calls_in_docstrings_are_code(site):
    record = read(site, "api").partition('id="dinov2_attn.record"')[2]
    assert '<span class="gp">' in record.partition("<h3")[0]
    for page in ("api", "reference/viz", "reference/typing"):
        assert "<blockquote>" not in read(site, page), (
            "`>>>` in a docstring was read as a quotation"
        )


def test_links_of_the_site_lead_to_files(site):
    for file in site.rglob("*.html"):
        if file.name == "404.html":
            continue
        links = re.findall(r'(?:href|src)="([^"#]+)', file.read_text("utf-8"))
        inside = [link for link in links if "://" not in link and not link.startswith("data:")]
        assert inside
        missing = [link for link in inside if not (file.parent / link).resolve().exists()]
        assert missing == [], file


def test_no_page_asks_another_server(site):
    for file in site.rglob("*.html"):
        text = file.read_text("utf-8")
        assert 'data-md-component="source"' not in text, "it asks GitHub for stars"
        assert re.findall(r'<(?:script|img|iframe)[^>]*src="?https?:', text) == []
        assert re.findall(r'<link[^>]*rel="stylesheet"[^>]*href="?https?:', text) == []


def test_links_to_the_repository_name_files_that_exist(site):
    source = PROJECT["urls"]["Source"]
    text = "".join(file.read_text("utf-8") for file in site.rglob("*.html"))
    text += (site / "llms.txt").read_text("utf-8")
    paths = set(re.findall(rf"{source}/(?:blob|tree)/main/([^\"#)\s]+)", text))
    assert {"CONTRIBUTING.md", "docs/quickstart.md"} <= paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_repository_is_that_of_the_project():
    source = PROJECT["urls"]["Source"]
    assert CONFIG["extra"]["repository"] == source
    assert {"Repository": source} in CONFIG["nav"]


def test_llms_txt_names_every_page():
    text = (ROOT / "llms.txt").read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert pages <= set(links)
    assert text.startswith("# dinov2-attn\n\n> ")
