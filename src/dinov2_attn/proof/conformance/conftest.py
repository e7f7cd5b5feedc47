"""Fixtures of the suite: the tested code, with and without the plugin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dinov2_attn
from dinov2_attn.backbone.structure import Role, name_of
from dinov2_attn.errors import in_one_line
from dinov2_attn.proof.conformance.code import CODE, GATE, Code

_HERE = Path(__file__).parent

# A test with one of these arguments runs once for each class of that part.
_CLASSES = {
    "attention_class": Role.ATTENTION,
    "block_class": Role.BLOCK,
    "causal_class": Role.CAUSAL_BLOCK,
    "model_class": Role.TRANSFORMER,
}


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the options if the suite is named by its folder."""
    pluginmanager.import_plugin("dinov2_attn.proof.conformance.plugin")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test for each class of its part. Skip it, with the reason, if there is none."""
    code = metafunc.config.stash[CODE]
    for name, part in _CLASSES.items():
        if name in metafunc.fixturenames:
            skip = pytest.mark.skip(reason=code.lacks(part.value))
            none = pytest.param(None, id="none", marks=skip)
            found = [pytest.param(cls, id=cls.__qualname__) for cls in code.classes(part)]
            metafunc.parametrize(name, found or [none])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run test_install first, and ignore warnings of the tested code."""
    for item in filter(_is_ours, items):
        item.add_marker(pytest.mark.filterwarnings("ignore"))
    items.sort(key=lambda item: _is_ours(item) and item.path.stem != "test_install")


def _is_ours(item: pytest.Item) -> bool:
    # A run may also collect tests of other projects.
    return _HERE in item.path.parents


@pytest.fixture(scope="session")
def code(pytestconfig: pytest.Config) -> Code:
    """Return the tested code."""
    return pytestconfig.stash[CODE]


@pytest.fixture(scope="session", autouse=True)
def _plain(code: Code) -> Iterator[None]:
    """Use one thread, since tensors are tiny, and the branch without xFormers.

    Upstream checks a global of its modules in every pass. It is true if xFormers is installed,
    but xFormers has no kernel for the CPU. Its branch is tested at install, with the definition
    of the kernel, and in test_nested where it can run.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("DINOV2_ATTN_TEST_THREADS", "1")))
    with pytest.MonkeyPatch.context() as patch:
        for module in code.gates:
            patch.setattr(module, GATE, False)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def refusal(code: Code) -> str | None:
    """Return why ``install`` rejects the code, for ``test_install``; ``None`` if it does not."""
    if (reason := code.incomplete()) is not None:
        return reason
    try:
        with dinov2_attn.install(code.package):
            code.left_out.update(dinov2_attn.status().left_out)
            return None
    except Exception as error:
        return f"{type(error).__name__}: {in_one_line(error)}"


@pytest.fixture(scope="session")
def accepted(request: pytest.FixtureRequest, code: Code, refusal: str | None) -> Code:
    """Return the code if ``install`` accepts it. Otherwise skip: test_install reports why."""
    if refusal is not None:
        if any(item.path.stem == "test_install" for item in request.session.items):
            pytest.skip("the code was rejected: test_install says why")
        pytest.fail(refusal, pytrace=False)
    return code


@pytest.fixture(autouse=True)
def _left_out(request: pytest.FixtureRequest, code: Code, refusal: str | None) -> None:
    """Skip the tests of a class that ``install`` leaves out: it keeps its own code."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    for name in _CLASSES.keys() & params.keys():
        if (cls := params[name]) is not None and (why := code.left_out.get(name_of(cls))):
            pytest.skip(f"left out by install: {why}")


@pytest.fixture
def ungrafted(accepted: Code) -> Code:
    """Return the code without the plugin, for tests that install and uninstall."""
    return accepted


@pytest.fixture(scope="module")
def grafted(accepted: Code) -> Iterator[Code]:
    """Yield the code with the plugin installed."""
    with dinov2_attn.install(accepted.package):
        yield accepted
