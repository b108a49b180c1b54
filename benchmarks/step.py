"""Whole training steps, time and memory, in one run: `python -m benchmarks.step`

TRL's own loss with LoRA and with PiSSA, BA-LoRA with each setting of the teacher, and the paper's way: a second model
and dense logits. Ratios are to the PiSSA step; the FLOP floor is counted for the same model: what the teacher's forward
pass must add where it runs.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, RegularizerConfig, regularizers

from .measuring import machine, measure, plot_bars, quiet, table

TERMS: dict[str, Any] = {"lambda_consistency": 0.5, "lambda_diversity": 0.02, "lambda_svd": 0.02, "share_interval": 0}
CPU_MODEL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 8192}
GPU_MODEL = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8, "vocab_size": 32000}


def build_model(gpu: bool, layers: int | None = None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = dict(GPU_MODEL if gpu else CPU_MODEL)
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    heads = shape["hidden_size"] // (128 if gpu else 32)
    config = LlamaConfig(**shape, num_attention_heads=heads, max_position_embeddings=2048, pad_token_id=0)
    model = LlamaForCausalLM(config)
    return model.to("cuda", torch.bfloat16) if gpu else model


def tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants one; the data is tokenised already."""
    from tokenizers import Tokenizer, models

    raw = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")


class Bench:
    """One model, one batch, one way of training."""

    def __init__(
        self, options: argparse.Namespace, device: torch.device, folder: Path, layers: int | None = None
    ) -> None:
        self.options, self.device, self.folder = options, device, folder
        self.base = build_model(device.type == "cuda", layers)
        generator = torch.Generator().manual_seed(1)
        vocabulary = self.base.config.vocab_size
        ids = torch.randint(2, vocabulary, (options.batch, options.length), generator=generator).tolist()
        self.rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])

    def trainer(self, cls: type[Trainer], peft_config: LoraConfig) -> Trainer:
        """A trainer on a fresh copy of the model, its optimizer and accelerator ready."""
        gpu = self.device.type == "cuda"
        args = SFTConfig(
            output_dir=str(self.folder),
            per_device_train_batch_size=self.options.batch,
            max_steps=10**6,
            learning_rate=1e-4,
            use_cpu=not gpu,
            bf16=gpu,
            gradient_checkpointing=self.options.checkpointing,
            report_to="none",
            disable_tqdm=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = cls(
            model=copy.deepcopy(self.base),
            args=args,
            train_dataset=self.rows,
            processing_class=tokenizer(),
            peft_config=peft_config,
        )
        trainer.create_optimizer_and_scheduler(10)
        trainer.current_gradient_accumulation_steps = 1
        if self.options.checkpointing:  # train() would, which is not called here
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.train()
        return trainer

    def step(self, trainer: Trainer, loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None) -> Any:
        """A function that takes one optimizer step with the host's own training_step (or with `loss`)."""
        batch = next(iter(trainer.get_train_dataloader()))
        batch = {key: value.to(self.device) for key, value in batch.items()}
        count = (batch["labels"][:, 1:] != -100).sum()

        def run() -> None:
            if loss is None:
                trainer.training_step(trainer.model, dict(batch), count)
            else:
                loss(trainer.model, dict(batch)).backward()
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()

        return run

    def adapter(self, **changes: Any) -> dict[str, Any]:
        r = self.options.rank
        return {"r": r, "lora_alpha": r, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}

    def ba_lora_trainer(self, compile: bool | str = False, **terms: Any) -> Trainer:
        config = BaLoraConfig(
            **self.adapter(init_lora_weights="pissa_fast"),
            regularizers=RegularizerConfig(**{**TERMS, **terms}),
            compile=compile,
        )
        return self.trainer(BaLoraSFTTrainer, config)

    def ba_lora(self, compile: bool | str = False, **terms: Any) -> Any:
        return self.step(self.ba_lora_trainer(compile, **terms))

    def contenders(self) -> dict[str, Callable[[], None]]:
        made = {
            "LoRA, TRL's loss": self.step(self.trainer(SFTTrainer, LoraConfig(**self.adapter()))),
            "PiSSA, TRL's loss": self.step(self.trainer(SFTTrainer, self.pissa())),
            "BA-LoRA": self.ba_lora(),
            "BA-LoRA, teacher cached": self.ba_lora(teacher_cache=str(self.folder / "cache")),
            "BA-LoRA, 128 log-probabilities cached": self.ba_lora(
                teacher_cache=str(self.folder / "top"), teacher_cache_top_k=128
            ),
            "BA-LoRA, without SVD": self.ba_lora(lambda_svd=0.0),
            "BA-LoRA, no terms": self.ba_lora(lambda_consistency=0.0, lambda_diversity=0.0, lambda_svd=0.0),
            "paper: second model, dense": self.papers(),
        }
        if self.options.interval > 1:  # the mean over the interval: every call is as many steps
            made[f"BA-LoRA, every {self.options.interval}th (per step)"] = self.interval()
        if self.options.compile:
            made["BA-LoRA, compiled"] = self.ba_lora(compile=True)
        return made

    def interval(self) -> Callable[[], None]:
        trainer = self.ba_lora_trainer(teacher_interval=self.options.interval)
        one = self.step(trainer)

        def run() -> None:
            for _ in range(self.options.interval):
                one()
                trainer.state.global_step += 1

        return run

    def pissa(self) -> LoraConfig:
        return LoraConfig(**self.adapter(init_lora_weights="pissa_niter_4"))

    def papers(self) -> Callable[[], None]:
        """PiSSA with a second resident model, dense logits of both and the SVD of the logits."""
        teacher = copy.deepcopy(self.base).eval().requires_grad_(False)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            labels = batch.pop("labels")
            counted = labels[:, 1:] != -100
            student = model(**batch).logits[:, :-1][counted]
            with torch.no_grad():
                reference = teacher(**batch).logits[:, :-1][counted]
            z, z_t = student.float(), reference.float()
            log_p = z.log_softmax(-1)
            task = nn.functional.cross_entropy(z, labels[:, 1:][counted])
            kl = regularizers.consistency(z, z_t)
            entropy = (log_p.exp() * log_p).sum(-1).mean()
            return task + 0.5 * kl + 0.02 * entropy + 0.02 * regularizers.spectral(z, k=10)

        return self.step(self.trainer(SFTTrainer, self.pissa()), loss)

    def floor(self) -> float:
        """FLOPs a BA-LoRA step needs over those of a PiSSA step, the products of the LM head included."""
        trainer = self.ba_lora_trainer()
        base = trainer.model.get_base_model()
        ids = torch.tensor(self.rows["input_ids"], device=self.device)
        with FlopCounterMode(display=False) as student:
            base.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
        with torch.no_grad(), trainer.model.disable_adapter(), FlopCounterMode(display=False) as teacher:
            base.base_model(input_ids=ids, use_cache=False)
        n = self.options.batch * (self.options.length - 1)
        head = 2 * n * base.config.hidden_size * base.config.vocab_size
        pissa = student.get_total_flops() + 2 * head
        return (pissa + teacher.get_total_flops() + head) / pissa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--interval", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="also BA-LoRA with compile=True (minutes on a CPU)")
    parser.add_argument("--output", type=Path, help="folder for step.md and step.png")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, device, Path(folder))
        floor = bench.floor()
        found = measure(bench.contenders(), options.repeats, device)
    millions = sum(p.numel() for p in bench.base.parameters()) / 1e6
    unit = {name: options.interval if "per step" in name else 1 for name in found}
    pissa = found["PiSSA, TRL's loss"]
    rows = [
        (name, result.note, "", "", "")
        if result.note
        else (
            name,
            f"{result.seconds / unit[name]:.3f}",
            f"{result.seconds / unit[name] / pissa.seconds:.2f}",
            f"{result.peak_mib:.0f}",
            f"{result.peak_mib / pissa.peak_mib:.2f}",
        )
        for name, result in found.items()
    ]
    tokens = f"{options.batch} x {options.length} tokens, rank {options.rank}"
    lines = [
        f"`python -m benchmarks.step` on {machine(device)}",
        "",
        f"**Llama of {millions:.0f}M parameters, {tokens}{', checkpointing' if options.checkpointing else ''}.** "
        f"FLOP floor of a BA-LoRA step with the teacher live: {floor:.2f} x PiSSA.",
        "",
        table(("", "seconds a step", "to PiSSA", "peak MiB", "to PiSSA"), rows),
        "",
    ]
    print("\n".join(lines))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "step.md").write_text("\n".join(lines))
        values = {name: r.seconds / unit[name] / pissa.seconds for name, r in found.items() if not r.note}
        plot_bars(options.output / "step.png", "A training step over a PiSSA step", {"time": values}, "time / PiSSA")


if __name__ == "__main__":
    main()
