"""Trains a classifier with gathered batch statistics on this rank's share, then evaluates; rank 0 stores what came."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch

from balora_plugin import RegularizerConfig
from integration.histories import rows_of
from integration.nlu_training import Gradients, build, rows


def train(batch: int) -> dict[str, Any] | None:
    """Gradients of the first step and the logs of two, of `batch` samples a rank; an evaluation of nine samples.

    On two ranks of four the second has nothing but repeats in the last batch.
    """
    terms = RegularizerConfig(
        lambda_consistency=0.5,
        lambda_diversity=0.5,
        lambda_svd=0.5,
        svd_norm="nuclear",
        svd_input="features",
        gather_batch_statistics=True,
        share_interval=0,  # shares are a rank's own
    )
    keep = Gradients()
    with tempfile.TemporaryDirectory() as directory:
        trainer = build(
            directory,
            terms=terms,
            data=rows(16),
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            max_steps=2,
            callbacks=[keep],
        )
        trainer.train()
        found = trainer.evaluate(rows(9))
        predicted = trainer.predict(rows(9).remove_columns("labels")).predictions
    logs = rows_of(trainer.state.log_history)
    found = {key: value for key, value in found.items() if key == "eval_loss" or "balora" in key}
    result = {"gradients": keep.found, "logs": logs, "evaluation": found, "predictions": predicted}
    return result if trainer.accelerator.is_main_process else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = train(int(sys.argv[2]))
    if result is not None:
        torch.save(result, sys.argv[1])
