"""Fine-tunes with Axolotl as a user would: `axolotl train` on example_configs/quickstart.yaml or a variant of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel

from .base import BaseModel
from .corpus import Corpus, Instruction
from .methods import RANK, SHARE_INTERVAL, TERM_PREFIX, Method, TrainedRun, last_logged
from .progress import Phase
from .settings import FinetuningSettings
from .task import Task

TEMPLATE = Path("example_configs/quickstart.yaml")
LAST_LINES = 25  # of the log, shown when a run fails
EVALUATION = ("test_datasets", "eval_strategy", "eval_steps", "eval_batch_size")


def link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has no such thing: weights are large."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def prepare(base: BaseModel, corpus: Corpus | Task, folder: Path) -> None:
    """Puts the model and both datasets where the YAML looks for them: `folder`/{base,train.jsonl,held_out.jsonl}."""
    for stale in ("base", "prepared"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    shutil.copytree(base.folder, folder / "base", copy_function=link)
    for name, pairs in (("train", corpus.train), ("held_out", corpus.held_out)):
        write_rows(folder / f"{name}.jsonl", pairs)


def write_rows(path: Path, pairs: Sequence[Instruction]) -> None:
    """The pairs as JSON lines with the keys `prompt` and `completion`."""
    path.write_text("".join(json.dumps(pair.as_row()) + "\n" for pair in pairs), encoding="utf-8")


def config(method: Method, settings: FinetuningSettings, folder: Path) -> dict[str, Any]:
    """The YAML's settings for `method`: adapter, start and block changed, paths below `folder`.

    Axolotl evaluates BA-LoRA's adapters alone: what it measures there is compared with the adapter as it is loaded.
    """
    values = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8"))
    values |= {
        "base_model": str(folder / "base"),
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / method.key),
        "lora_r": RANK,
        "lora_alpha": RANK,
        "max_steps": settings.steps,
        "eval_steps": settings.steps,
        "save_steps": settings.steps,
        "logging_steps": max(1, settings.steps // 6),
        "micro_batch_size": settings.batch,
        "eval_batch_size": settings.batch,
        "learning_rate": settings.rate_of(method.start),
        "sequence_len": settings.max_length,
        "seed": settings.seed,
        "peft_init_lora_weights": method.start,
    }
    values["datasets"][0]["path"] = str(folder / "train.jsonl")
    values["test_datasets"][0]["path"] = str(folder / "held_out.jsonl")
    if method.terms is not None:
        measured = {"share_interval": SHARE_INTERVAL} if method.has_terms else {}
        return values | {"ba_lora": {**method.terms, **measured}}
    for key in ("ba_lora", *EVALUATION):
        del values[key]
    # Axolotl turns its GPU kernels for plain LoRA on by itself
    kernels = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
    return values | kernels | {"adapter": "lora"}


def config_file(method: Method, settings: FinetuningSettings, folder: Path) -> Path:
    """The example itself where nothing differs from it, else a variant in `folder`."""
    values = config(method, settings, folder)
    if values == yaml.safe_load(TEMPLATE.read_text(encoding="utf-8")):
        return TEMPLATE
    path = folder / f"{method.key}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def finetune(
    method: Method,
    base: BaseModel,
    settings: FinetuningSettings,
    folder: Path,
    threads: int = 1,
    progress: bool = True,
) -> TrainedRun:
    """Runs `axolotl train` on what `prepare` put into `folder`; the adapter lands in `folder`/`method.key`.

    Raises:
        SystemExit: the run failed; its last lines are printed.
    """
    path, adapter = config_file(method, settings, folder), folder / method.key
    if progress:
        print(f"\n$ axolotl train {path.as_posix()} --launcher python", flush=True)
    shutil.rmtree(adapter, ignore_errors=True)  # a checkpoint of an earlier run
    start = time.perf_counter()
    log = folder / f"{method.key}.log"
    per_step = watch(path, log, settings.steps, threads, f"{method.label}: fine-tuning", progress)
    seconds = time.perf_counter() - start
    state = json.loads((adapter / f"checkpoint-{settings.steps}" / "trainer_state.json").read_text())
    history = state["log_history"]
    model = PeftModel.from_pretrained(base.load_model(), str(adapter)).eval()
    task = last_logged(history, f"eval_{TERM_PREFIX}task").get(f"eval_{TERM_PREFIX}task")
    return TrainedRun(model, adapter, seconds, last_logged(history, TERM_PREFIX), task, per_step)


class StepWatch:
    """Reads optimizer steps off Axolotl's progress bar, and when the first and the last one ended."""

    def __init__(self, steps: int, tell: Callable[[str], None]) -> None:
        self.steps, self.tell = steps, tell
        self._pattern = re.compile(rf"\b(\d+)/{steps} \[")
        self._ended: dict[int, float] = {}

    def read(self, line: str) -> None:
        """Takes one line of output."""
        for found in self._pattern.findall(line):
            self._ended.setdefault(int(found), time.perf_counter())
            self.tell(f"step {found} of {self.steps}")

    def seconds_per_step(self) -> float | None:
        """The mean between the first step's end and the last one's; None where only one was seen."""
        ends = {step: at for step, at in self._ended.items() if step}
        first, last = min(ends, default=0), max(ends, default=0)
        return (ends[last] - ends[first]) / (last - first) if last > first else None


def watch(path: Path, log: Path, steps: int, threads: int, description: str, progress: bool) -> float | None:
    """Runs Axolotl's command line, keeps its output in `log` and says how far it is; the seconds of a step.

    Raises:
        SystemExit: the run failed; the end of its log is printed.
    """
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path), "--launcher", "python"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONUTF8": "1"}
    for key in ("TRANSFORMERS_VERBOSITY", "TQDM_DISABLE"):  # its output is kept, and read
        environment.pop(key, None)
    with (
        Phase(description, progress) as phase,
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        phase.at("Axolotl is starting")
        seen = StepWatch(steps, phase.at)
        assert process.stdout is not None
        for line in process.stdout:  # universal newlines: a progress bar's carriage returns end lines too
            kept.write(line)
            seen.read(line)
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-LAST_LINES:])
        raise SystemExit(f"{tail}\n\naxolotl train {path} failed; its whole output is in {log}")
    return seen.seconds_per_step()
