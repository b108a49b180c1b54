"""Two ranks of a gloo group on this machine, forked: the libraries are imported already, else most of a minute."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank, directory, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=2)
    torch.save(function(rank, *arguments), f"{directory}/returned-{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(directory, function, *arguments):
    """What function(rank, *arguments) returns on each rank, in order; `directory` is empty."""
    mp.start_processes(_rank, (str(directory), function, arguments), nprocs=2, start_method="fork")
    return [torch.load(directory / f"returned-{rank}.pt") for rank in range(2)]
