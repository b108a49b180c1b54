"""Which linear layers of a class of their own an adapter can stand on."""

from __future__ import annotations

import pytest
import torch

from balora_plugin.adapter.targets import gives_its_product

pytestmark = pytest.mark.hosts


def of_groups():
    module = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    return module.DeepseekV4GroupedLinear(8, 32, n_groups=4)


def of_falcon():
    from transformers.models.falcon.modeling_falcon import FalconLinear

    return FalconLinear(8, 32)


@pytest.mark.parametrize(("build", "expected"), [(of_groups, False), (of_falcon, True), (torch.nn.Identity, True)])
def test_a_layer_that_multiplies_groups_of_rows_is_no_product_of_a_row(build, expected):
    assert gives_its_product(build()) is expected
