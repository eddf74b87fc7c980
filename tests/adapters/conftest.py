"""Adapters with diffusers' output classes where it is installed, and with our own."""

from __future__ import annotations

import pytest

from capacitor_rt.adapters import outputs


@pytest.fixture(params=["diffusers", "own"])
def either_outputs(request, monkeypatch):
    """The name of the classes that adapters made in the test return."""
    if request.param == "diffusers":
        pytest.importorskip("diffusers")
        outputs.output_classes.cache_clear()
        assert outputs.output_classes() is not outputs.OWN
    else:
        monkeypatch.setattr("capacitor_rt.adapters.base.output_classes", lambda: outputs.OWN)
    return request.param
