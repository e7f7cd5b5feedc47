"""Fixtures: the code at hand, with the plugin installed on it or not yet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dinov2_attn
from dinov2_attn.backbone.structure import Role
from dinov2_attn.errors import in_one_line
from dinov2_attn.proof.conformance.code import CODE, GATE, Code

_HERE = Path(__file__).parent

# The tests that take one of these run once for each class that was found.
_CLASSES = {
    "attention_class": Role.ATTENTION,
    "block_class": Role.BLOCK,
    "causal_class": Role.CAUSAL_BLOCK,
    "model_class": Role.TRANSFORMER,
}


def pytest_addoption(pluginmanager: pytest.PytestPluginManager) -> None:
    """Bring in the options where the suite is named by its folder."""
    pluginmanager.import_plugin("dinov2_attn.proof.conformance.plugin")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test for each class of the kind that it asks for; skip it, saying why, for none."""
    code = metafunc.config.stash[CODE]
    for name, part in _CLASSES.items():
        if name in metafunc.fixturenames:
            skip = pytest.mark.skip(reason=code.lacks(part.value))
            none = pytest.param(None, id="none", marks=skip)
            found = [pytest.param(cls, id=cls.__qualname__) for cls in code.classes(part)]
            metafunc.parametrize(name, found or [none])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ask first whether the code is recognised, and let its warnings pass in any project."""
    for item in filter(_is_ours, items):
        item.add_marker(pytest.mark.filterwarnings("ignore"))
    items.sort(key=lambda item: _is_ours(item) and item.path.stem != "test_install")


def _is_ours(item: pytest.Item) -> bool:
    # Beside this suite, a run may hold tests of anybody's.
    return _HERE in item.path.parents


@pytest.fixture(scope="session")
def code(pytestconfig: pytest.Config) -> Code:
    """The code at hand."""
    return pytestconfig.stash[CODE]


@pytest.fixture(scope="session", autouse=True)
def _plain(code: Code) -> Iterator[None]:
    """One thread, for tensors are tiny, and PyTorch's branch of the code, not xFormers'.

    Upstream asks a global of its modules whenever it runs. Where xFormers is installed that
    says yes, and there is no kernel of xFormers' for the CPU: its branch is proved at
    install over the definition of that kernel, and in test_nested where it can run.
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
    """Why the code cannot be installed on, for ``test_install`` to report; ``None`` if it can."""
    if (reason := code.incomplete()) is not None:
        return reason
    try:
        with dinov2_attn.install(code.package):
            return None
    except Exception as error:
        return f"{type(error).__name__}: {in_one_line(error)}"


@pytest.fixture(scope="session")
def accepted(request: pytest.FixtureRequest, code: Code, refusal: str | None) -> Code:
    """The code, where it can be installed on; one test says why it cannot be, if it is there."""
    if refusal is not None:
        if any(item.path.stem == "test_install" for item in request.session.items):
            pytest.skip("the code was refused: test_install says why")
        pytest.fail(refusal, pytrace=False)
    return code


@pytest.fixture
def ungrafted(accepted: Code) -> Code:
    """The code as it is, for tests that install and uninstall."""
    return accepted


@pytest.fixture(scope="module")
def grafted(accepted: Code) -> Iterator[Code]:
    """The code with the plugin installed on it."""
    with dinov2_attn.install(accepted.package):
        yield accepted
