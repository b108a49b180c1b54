"""Awkward batches, and a run that is resumed, on two ranks or alone, for test_resume_ranks.py.

Ranks: ddp, fsdp1, fsdp2, zero2, zero3.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.constants import FSDP_MODEL_NAME
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, TrainerCallback, TrainingArguments
from transformers import trainer as trainer_module
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from balora_plugin import BaLoraConfig, BaLoraTrainer, RegularizerConfig, get_ba_lora_model
from balora_plugin.adapter.delta import delta_layers_of
from integration.histories import rows_of
from integration.workers.fsdp import Keep, gather, pass_as_gpus, sharding
from tests.models import character_tokenizer, tiny_llama

# of four samples a step the second rank's two count no token in the first, and the second has three, of 3 to 9 tokens
ROWS: list[dict[str, Any]] = [{"input_ids": [5 + i, 6, 7 + i, 8, *range(9, 12 + i)]} for i in range(7)]
ROWS = [
    {**row, "labels": [-100] + [-100 if i in (2, 3) else t for t in row["input_ids"][1:]]} for i, row in enumerate(ROWS)
]


class KeepAll(Keep):
    """The gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if not args.deepspeed:
            self.steps.append(self.whole(model))

    # DeepSpeed steps inside its backward pass: there the gradient is what SGD made of the weights
    def on_step_begin(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if args.deepspeed:
            self.before = weights(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if args.deepspeed:
            after = weights(model)
            self.steps.append({key: (self.before[key] - value) / args.learning_rate for key, value in after.items()})


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What trains, whole, under DeepSpeed."""
    from deepspeed.runtime.zero import GatheredParameters

    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[name.removeprefix("module.")] = parameter.detach().clone()
    return found


def model_and_adapter(args: TrainingArguments, dropout: float, flipped: bool = False) -> Any:
    """`flipped`: onto the SVD with all signs changed, which is one too, as another machine might give."""
    terms = RegularizerConfig(
        lambda_consistency=0.5, lambda_diversity=0.1, lambda_svd=0.1, svd_top_k=3, share_interval=0
    )
    config = BaLoraConfig(r=4, lora_alpha=4, target_modules="all-linear", regularizers=terms, lora_dropout=dropout)
    base = tiny_llama()
    if is_deepspeed_zero3_enabled():  # loaded in parts
        from deepspeed import init_distributed

        init_distributed("gloo")
        base = LlamaForCausalLM.from_pretrained(Path(args.output_dir).parent / f"base-{args.process_index}")
        assert all(parameter.numel() == 0 for parameter in base.parameters())
    model = get_ba_lora_model(base, config)
    if flipped:
        for _, layer in delta_layers_of(model):
            for factor in (layer.frozen_A["default"], layer.frozen_B["default"]):
                factor.weight.data.neg_()
    return model


def zero(stage: int) -> dict[str, Any]:
    """A DeepSpeed config with the trainer's own values."""
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,  # split even what is tiny, as real sizes are
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


def train(
    kind: str,
    directory: Path,
    rows: Any,
    callbacks: list[TrainerCallback],
    *,
    dropout: float = 0.1,
    flipped: bool = False,
    resume: Any = None,
    **changes: Any,
) -> BaLoraTrainer:
    """Two samples a micro-batch, four a step."""
    values = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2 if kind == "alone" else 1,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "linear",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if kind.startswith("zero"):
        values["deepspeed"] = zero(int(kind[-1]))
    args = TrainingArguments(**{**values, **changes}, **sharding(kind, "LlamaDecoderLayer"))
    if kind.startswith(("fsdp", "zero")):
        pass_as_gpus(args)
        os.environ.pop("ACCELERATE_USE_CPU", None)  # accelerate offers a CPU no DeepSpeed
    elif kind == "ddp":
        assert args.device.type == "cpu"  # builds the state
        cpu = torch.device("cpu")  # torch.load knows none with an index
        args.__dict__["_setup_devices"] = PartialState._shared_state["device"] = cpu
    data = Dataset.from_list(rows)
    trainer = BaLoraTrainer(
        model=model_and_adapter(args, dropout, flipped),
        args=args,
        train_dataset=data,
        eval_dataset=Dataset.from_list(ROWS),
        data_collator=DataCollatorForSeq2Seq(character_tokenizer()),
        callbacks=callbacks,
        compute_metrics=lambda found: {"rows": len(found.predictions)},
    )
    if kind == "fsdp1":
        trainer.accelerator.get_state_dict = gather
        trainer_module.save_fsdp_model = save_what_trains
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def save_what_trains(plugin: Any, accelerator: Any, model: Any, directory: str, **kwargs: Any) -> None:
    """What accelerate writes under FSDP1 on a GPU."""
    whole = gather(model)
    if accelerator.is_main_process:
        torch.save({k: v for k, v in whole.items() if ".lora_" in k}, Path(directory, f"{FSDP_MODEL_NAME}.bin"))


def main(directory: str, kind: str) -> None:
    torch.set_num_threads(1)
    where, keep = Path(directory), KeepAll()
    if kind == "zero3":
        tiny_llama().save_pretrained(where / f"base-{os.environ['RANK']}")
    # accelerate completes an uneven batch with the first samples: the reference gets them from its data
    rows = [*ROWS, ROWS[0]] if kind == "alone" else ROWS
    # no dropout: ranks draw other masks than one process
    sgd = {"num_train_epochs": 1, "optim": "sgd", "lr_scheduler_type": "constant"}
    edges = train(kind, where / "edges", rows, [keep], dropout=0.0, **sgd)
    result: dict[str, Any] = {
        "gradients": keep.steps,
        "logs": rows_of(edges.state.log_history),
        "eval": edges.evaluate(),
    }
    if kind != "alone":
        saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
        # one tensor a parameter: of two, FSDP1 on a CPU writes the second in place of both
        saving["optim"] = "rmsprop" if kind == "fsdp1" else "adamw_torch"
        # of evaluations that are equally good the first is the best
        best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "rows", "greater_is_better": True}
        whole = train(kind, where / "whole", ROWS, [], **saving, **best, load_best_model_at_end=True)
        whole.save_model(str(where / "best"))
        resumed = train(
            kind, where / "resumed", ROWS, [], flipped=True, resume=str(where / "whole" / "checkpoint-2"), **saving
        )
        result |= {"whole": rows_of(whole.state.log_history), "resumed": rows_of(resumed.state.log_history)}
    if edges.accelerator.is_main_process:
        torch.save(result, where / "result.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
