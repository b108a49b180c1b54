"""The scripts beside the paper's YAMLs: TRL takes the same file, DeepSeek-MoE becomes a class that transformers has."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from balora_plugin import BaLoraSFTTrainer

pytest.importorskip("trl")
pytest.importorskip("PIL")
from .configs.tiny import FIRST, byte_tokenizer, swapped

PAPER = Path(__file__).parents[1] / "example_configs" / "paper"
SCRIPT = runpy.run_path(str(PAPER / "with_trl.py"), run_name="script")
NLG = sorted(path for path in PAPER.glob("*.yaml") if path.stem != "gpt2-xl")


@pytest.mark.parametrize("path", NLG, ids=lambda path: path.stem)
def test_trl_takes_the_same_file(path):
    values = SCRIPT["read"](str(path))
    arguments = SCRIPT["arguments"](values, use_cpu=True, bf16=False)
    assert (arguments.learning_rate, arguments.max_length, arguments.seed) == (2e-5, 512, 42)
    engines = 8 if "fsdp_config" in values else 1
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * engines == 128
    config = SCRIPT["adapter"](values)
    assert config.r == config.lora_alpha == (64 if path.stem in ("mistral-7b", "gemma-7b") else 128)
    assert SCRIPT["terms"](values).preset == "paper"


def test_a_baseline_an_ablation_and_what_the_script_cannot():
    path = str(PAPER / "llama2-7b.yaml")
    assert SCRIPT["adapter"](SCRIPT["read"](path, "full")) is None
    assert SCRIPT["adapter"](SCRIPT["read"](path, "dora")).use_dora
    assert SCRIPT["adapter"](SCRIPT["read"](path, "lora")).init_lora_weights is True
    ablation = SCRIPT["terms"](SCRIPT["read"](path, None, "svd"))
    assert (ablation.lambda_consistency, ablation.lambda_diversity, ablation.lambda_svd) == (0, 0, None)
    with pytest.raises(ValueError, match=r"model_type: .* has no counterpart"):
        SCRIPT["read"](str(PAPER / "gpt2-xl.yaml"))


@pytest.mark.parametrize("method", ["ba_lora", "dora"])
def test_it_trains(method, tmp_path):
    values = yaml.safe_load((PAPER / "qwen1.5-7b.yaml").read_text(encoding="utf-8"))
    small = swapped(values, tmp_path)
    kept = {key: value for key, value in small.items() if key in values or key == "max_steps"}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(kept))
    read = SCRIPT["read"](str(tmp_path / "small.yaml"), method, "all")
    data = SCRIPT["rows"](read)
    assert len(data) == FIRST and data[0]["prompt"].endswith(
        "\n\n### Instruction:\nWhat is 0 plus 0?\n\n### Response: "
    )
    trainer = BaLoraSFTTrainer(
        model=read["base_model"],
        args=SCRIPT["arguments"](read, use_cpu=True, report_to=[], save_strategy="no"),
        train_dataset=data,
        peft_config=SCRIPT["adapter"](read),
        regularizers=SCRIPT["terms"](read),
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "balora/consistency" in row]
    assert rows[0]["balora/consistency"] == pytest.approx(0, abs=1e-9) and rows[-1]["balora/consistency"] > 0
    learned = trainer.train_dataset[0]
    if "completion_mask" in learned:
        kept = [t for t, mask in zip(learned["input_ids"], learned["completion_mask"], strict=True) if mask]
        assert byte_tokenizer().decode(kept).startswith("It is 0, of course.")


class Routed(nn.Module):
    """DeepSeek-MoE's block, token by token: softmax over all experts, the best ones' weights as they are."""

    def __init__(self, config, experts, inner, shared, chosen):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, experts, bias=False)
        self.experts = nn.ModuleList(self._mlp(config, inner) for _ in range(experts))
        self.shared_experts = self._mlp(config, inner * shared)
        self.chosen = chosen

    @staticmethod
    def _mlp(config, inner):
        return LlamaMLP(LlamaConfig(hidden_size=config.hidden_size, intermediate_size=inner))

    def forward(self, hidden):
        out = torch.zeros_like(hidden)
        for index in torch.cartesian_prod(*map(torch.arange, hidden.shape[:-1])):
            token = hidden[tuple(index)]
            weights, best = self.gate(token).softmax(-1).topk(self.chosen)
            out[tuple(index)] = sum(w * self.experts[int(e)](token) for w, e in zip(weights, best, strict=True))
        return out + self.shared_experts(hidden)


def test_deepseek_moe_is_the_same_function_as_a_native_class(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.2, tie_word_embeddings=False)
    original = LlamaForCausalLM(config).eval()
    for layer in original.model.layers[1:]:
        layer.mlp = Routed(config, experts=6, inner=24, shared=2, chosen=3)
        for parameter in layer.mlp.parameters():
            nn.init.normal_(parameter, std=0.3)
    source = tmp_path / "source"
    source.mkdir()
    save_file(original.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    theirs = {"n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1}
    theirs |= {"model_type": "deepseek", "moe_intermediate_size": 24, "norm_topk_prob": False, "torch_dtype": "float32"}
    theirs |= {"max_position_embeddings": 128, "hidden_act": "silu", "tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps({**sizes, **heads, **theirs}))
    script = runpy.run_path(str(PAPER / "deepseek_moe_as_native.py"), run_name="script")
    script["convert"](source, tmp_path / "native")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    ids = torch.randint(3, 96, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(native(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
    other = {**sizes, **heads, **theirs, "scoring_func": "sigmoid"}
    with pytest.raises(ValueError, match=r"scoring_func: 'sigmoid' in config.json"):
        script["as_ernie"](other)
