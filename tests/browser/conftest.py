"""One browser for the tests of a process, and the page that several of them look at."""

from __future__ import annotations

import pytest
from browser import Visit, launched
from view_pages import HOSTILE, make_page, shown


@pytest.fixture(scope="session")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture(scope="session")
def items():
    # wide and tall ones, of which the twelfth has a name that no page should trust
    sizes = ((48, 64), (64, 48))
    return [shown(i, *sizes[i % 2], name=HOSTILE if i == 11 else None) for i in range(12)]


@pytest.fixture(scope="session")
def results(tmp_path_factory, items):
    return make_page(tmp_path_factory.mktemp("page") / "out", items).index


@pytest.fixture(scope="session")
def context(browser):
    visit = Visit(browser)
    yield visit
    visit.context.close()


@pytest.fixture
def visit(context):
    yield context
    context.leave()
