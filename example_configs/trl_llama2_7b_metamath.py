"""LLaMA-2-7B on MetaMathQA with TRL: the paper's NLG settings. Needs a GPU of the 40 GB class and the model's licence.

The paper's second arXiv version prints the r = 128 block under NLU and the r in {8, 16} block under NLG; the authors'
scripts and the published parameter counts show that the two are swapped, so r = alpha = 128 stands here.

Run: python example_configs/trl_llama2_7b_metamath.py
"""

from __future__ import annotations

from typing import Any

from trl import SFTConfig

from balora_plugin import BaLoraConfig, BaLoraSFTTrainer, RegularizerConfig

MODEL = "meta-llama/Llama-2-7b-hf"
DATA = "meta-math/MetaMathQA"
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response: "
)


def adapter() -> BaLoraConfig:
    """r = alpha = 128 on all seven projections, no dropout, no bias (Mistral-7B and Gemma-7B: r = 64)."""
    return BaLoraConfig(
        r=128,
        lora_alpha=128,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        init_lora_weights="pissa",  # to a tolerance, in seconds to minutes; "pissa_exact": by an SVD
        task_type="CAUSAL_LM",
        regularizers=RegularizerConfig(preset="paper"),  # or "iclr2026"
    )


def arguments(**changes: Any) -> SFTConfig:
    """AdamW, learning rate 2e-5, cosine, warm-up 0.03, no weight decay, one epoch, batch 128, length 512."""
    values: dict[str, Any] = {
        "output_dir": "outputs/llama2-7b-metamath",
        "learning_rate": 2e-5,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # below 1: a share of all steps
        "weight_decay": 0.0,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 32,
        "gradient_checkpointing": True,
        "max_length": 512,
        "completion_only_loss": True,
        "bf16": True,
        "logging_steps": 10,
        "seed": 42,
        "model_init_kwargs": {"dtype": "bfloat16"},
    }
    return SFTConfig(**{**values, **changes})


def main() -> None:
    from datasets import load_dataset

    data = load_dataset(DATA, split="train[:100000]")
    data = data.map(
        lambda row: {"prompt": PROMPT.format(query=row["query"]), "completion": row["response"]},
        remove_columns=data.column_names,
    )
    trainer = BaLoraSFTTrainer(model=MODEL, args=arguments(), train_dataset=data, peft_config=adapter())
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
