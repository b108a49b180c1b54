"""Two optimizer steps sharded by FSDP1 or FSDP2, or alone, for test_sharded.py: the gradients are the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig
from balora_plugin.fused import HeadFactor
from integration.histories import rows_of
from tests.models import character_tokenizer, tiny_llama

PREFIX = "_fsdp_wrapped_module."
ROWS = [{"input_ids": [5 + i, 6, 7 + i, 8, *range(9, 12 + i % 4)]} for i in range(16)]
ROWS = [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in ROWS]


class OwnUnit(torch.nn.Linear):
    """An LM head under a name of its own, for a wrap policy that makes it a unit."""


class Keep(TrainerCallback):
    """Remembers the whole gradients of the first optimizer step, whatever shards them."""

    gradients: dict[str, torch.Tensor]

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if not state.global_step:
            self.gradients = self.whole(model)

    def whole(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        if isinstance(model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True, writeback=False):
                return self.collect(model)
        return self.collect(model)

    def collect(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        gradients = {}
        for name, p in model.named_parameters():
            if p.grad is not None and p.grad.numel():
                grad: Any = p.grad
                grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                gradients[name.replace(PREFIX, "").removeprefix("module.")] = grad.detach().clone()
        return gradients


def count_factors() -> list[int]:
    """Grows by one at every factorisation of the head."""
    made: list[int] = []
    original = HeadFactor.from_weight.__func__  # type: ignore[attr-defined]

    def counted(cls: type[HeadFactor], *args: Any, **kwargs: Any) -> HeadFactor:
        made.append(1)
        return original(cls, *args, **kwargs)

    HeadFactor.from_weight = classmethod(counted)  # type: ignore[method-assign, assignment]
    return made


def sharding(kind: str, units: str, *, saved: str = "FULL_STATE_DICT") -> dict[str, Any]:
    """What asks transformers and accelerate for FSDP."""
    if not kind.startswith("fsdp"):
        return {}
    config = {
        "version": int(kind[-1]),
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": units.split(","),
        "use_orig_params": True,
        "state_dict_type": saved,
        "sync_module_states": False,  # accelerate wants a GPU for it
    }
    return {"fsdp": True, "fsdp_config": config}


def pass_as_gpus(args: TrainingArguments) -> None:
    """accelerate gives CPU ranks DDP whatever is asked."""
    assert args.device.type == "cpu"  # builds the state
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState._shared_state["device"] = torch.device("cpu")  # without the index that FSDP1 does not know


def gather(model: torch.nn.Module, unwrap: bool = True) -> dict[str, torch.Tensor]:
    """What FSDP1's full state dict is on a GPU; on a CPU torch frees it while it gathers it."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {key.replace(PREFIX, ""): value.detach().clone() for key, value in model.named_parameters()}


def adapted_layers(layers: str) -> dict[str, Any]:
    """What names them to PEFT."""
    if not layers:
        return {"target_modules": "all-linear"}
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {"target_modules": names, "layers_to_transform": [int(layer) for layer in layers.split(",")]}


def main(
    directory: str, kind: str, units: str, modules_to_save: str = "", layers: str = "", teacher_pass: str = "shared"
) -> None:
    """Eight samples a step, in two micro-batches or on two ranks; stores gradients, logs, factorisations (rank 0).

    `layers`: those that are adapted, of four; the two below them all teacher and student share. Left out: both of two.
    """
    torch.set_num_threads(1)
    made, keep = count_factors(), Keep()
    terms = RegularizerConfig(
        lambda_consistency=0.5,
        lambda_diversity=0.1,
        lambda_svd=0.1,
        svd_top_k=3,
        share_interval=0,
        teacher_pass=teacher_pass,
    )
    config = BaLoraConfig(
        r=4,
        lora_alpha=4,
        regularizers=terms,
        modules_to_save=modules_to_save.split(",") if modules_to_save else None,
        **adapted_layers(layers),
    )
    args = TrainingArguments(
        output_dir=directory,
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2 if kind == "alone" else 1,
        logging_steps=1,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        **sharding(kind, units),
    )
    if kind != "alone":
        pass_as_gpus(args)
    model = tiny_llama(num_hidden_layers=4 if layers else 2)
    model.lm_head.__class__ = OwnUnit
    trainer = BaLoraTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        data_collator=DataCollatorForSeq2Seq(character_tokenizer()),
        callbacks=[keep],
        peft_config=config,
    )
    trainer.train()
    heads = len(made)
    if kind == "fsdp1":
        trainer.accelerator.get_state_dict = gather
    trainer.save_model(directory)
    if trainer.accelerator.is_main_process:
        logs = rows_of(trainer.state.log_history)
        wrapped = type(trainer.model_wrapped).__name__
        shared, by_layer = trainer.ba_lora_run.shared, trainer.ba_lora_run.by_layer  # type: ignore[union-attr]
        result = {"gradients": keep.gradients, "logs": logs, "factors": heads, "wrapped": wrapped}
        result |= {"shared": (shared.first, shared.passes, shared.why)}  # type: ignore[union-attr]
        result["by_layer"] = by_layer and (by_layer.passes, by_layer.why)
        torch.save(result, Path(directory, "result.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
