"""The paper's figures for LLaMA-2-7B (r = 128, second arXiv version), in percent; MT-Bench in points."""

from __future__ import annotations

PUBLISHED: dict[str, dict[str, float]] = {
    "gsm8k": {"full": 49.13, "lora": 42.47, "pissa": 52.37, "ba_lora": 54.53},
    "math": {"full": 7.29, "lora": 5.60, "pissa": 7.76, "ba_lora": 9.21},
    "humaneval": {"full": 21.20, "lora": 17.03, "pissa": 21.55, "ba_lora": 23.58},
    "mbpp": {"full": 35.59, "lora": 32.77, "pissa": 33.09, "ba_lora": 36.86},
    "mt_bench": {"full": 4.91, "lora": 4.62, "pissa": 4.87, "ba_lora": 5.11},
}
