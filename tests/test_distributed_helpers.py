"""What processes ask of one another: of a single process, and of two."""

from __future__ import annotations

import os

import pytest
import torch
from forked import on_two_ranks
from torch import nn

from balora_plugin import distributed

CPU = torch.device("cpu")


def test_a_process_without_a_group_is_a_job_of_its_own():
    assert not distributed.has_process_group()
    assert (distributed.world_size(), distributed.process_rank(), distributed.ranks_here()) == (1, 0, [])
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    assert distributed.sum_over_processes(3, CPU) == 3
    assert distributed.any_process(True, CPU) is True and distributed.any_process(False, CPU) is False


def test_an_error_of_a_single_process_is_raised():
    distributed.raise_on_every_process(None)
    with pytest.raises(ValueError, match=r"^layer 3: rank too large$"):
        distributed.raise_on_every_process("layer 3: rank too large")


def test_a_parameter_that_is_whole_is_given_as_it_is():
    weight = nn.Parameter(torch.ones(2))
    with distributed.gathered(weight) as whole:
        assert whole is weight


def test_what_is_sharded_is_seen_by_its_parameters_or_its_wrapper():
    model = nn.Sequential(nn.Linear(2, 2))
    assert not distributed.is_sharded(model)
    model[0].weight.ds_id = 0  # as ZeRO-3 marks one
    assert distributed.is_sharded(model)
    wrapper = type("FullyShardedDataParallel", (nn.Module,), {})
    assert distributed.is_sharded(nn.Sequential(wrapper()))


def _agree(rank):
    """All of it, in the same order on both ranks: each line waits for the other."""
    found = {
        "group": distributed.has_process_group(),
        "place": (distributed.world_size(), distributed.process_rank()),
        "objects": distributed.gather_objects({"rank": rank}),
        "sum": distributed.sum_over_processes(10 + rank, CPU),
        "any": [distributed.any_process(flag, CPU) for flag in (False, rank == 1, True)],
        "device": str(distributed.collective_device(CPU)),
    }
    distributed.raise_on_every_process(None)
    for name, error in (("one", "of rank 1" if rank == 1 else None), ("both", f"of rank {rank}")):
        try:
            distributed.raise_on_every_process(error)
        except ValueError as raised:
            found[name] = str(raised)
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    found["one node"] = distributed.ranks_here()
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # a node of its own for each
    found["two nodes"] = distributed.ranks_here()
    return found


def test_two_processes_agree(tmp_path):
    both = on_two_ranks(tmp_path, _agree)
    for rank, found in enumerate(both):
        assert found["group"] and found["place"] == (2, rank)
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        assert found["sum"] == 21
        assert found["any"] == [False, True, True]
        assert found["device"] == "cpu"
        assert found["one"] == "of rank 1", "raised by a rank that has no error itself"
        assert found["both"] == "of rank 0"
        assert found["two nodes"] == [rank]
    assert both[0]["one node"] == [0, 1]
