"""The settings of every method of every study are ones that train: a study finds out hours later."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")
from balora_plugin import RegularizerConfig
from studies.forgetting.cells import METHODS as FORGETTING
from studies.glue.cells import METHODS as GLUE
from studies.inheritance.cells import METHODS as INHERITANCE

STUDIES = {"forgetting": (FORGETTING, "nlg"), "glue": (GLUE, "nlu"), "inheritance": (INHERITANCE, "nlg")}


@pytest.mark.parametrize("study", STUDIES)
def test_every_method_can_be_built(study):
    methods, task = STUDIES[study]
    assert len(methods) > 8
    for method in methods.values():
        RegularizerConfig(**method.terms).resolved(task)
