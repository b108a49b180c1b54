"""A run from start to export under an audit hook, for test_trust.py: what it opens to write, connects to, unpickles."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SEEN: dict[str, list[str]] = {"written": [], "network": [], "unpickled": [], "executed": [], "pickles": []}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")  # torch.load(weights_only=True) unpickles past the audit's eyes
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


def hook(event: str, args: tuple[object, ...]) -> None:
    if event == "open":
        path, _, flags = args
        if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & WRITES:
            SEEN["written"].append(os.path.realpath(os.fsdecode(path)))
        elif isinstance(path, (str, bytes)) and os.fsdecode(path).endswith(PICKLES):
            SEEN["pickles"].append(os.path.basename(os.fsdecode(path)))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
        SEEN["written"].append(os.path.realpath(os.fsdecode(str(args[0]))))
    elif event in ("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"):
        SEEN["written"].append(os.path.realpath(os.fsdecode(str(args[1]))))
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.bind"):
        SEEN["network"].append(f"{event} {args[1:]}")
    elif event == "pickle.find_class":
        SEEN["unpickled"].append(f"{args[0]}.{args[1]}")
    elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
        SEEN["executed"].append(str(args[0]))


def main(directory: str) -> None:
    import torch
    from crash import trainer
    from models import character_tokenizer, tiny_llama

    from balora_plugin import BaLoraModel
    from balora_plugin.adapter.start import disk_cache
    from balora_plugin.commands import main as balora

    disk_cache.SMALLEST = 0
    torch.set_num_threads(1)
    here = Path(directory)
    tiny_llama().save_pretrained(here / "base")
    character_tokenizer().save_pretrained(here / "base")
    before = {name: len(entries) for name, entries in SEEN.items()}
    sys.addaudithook(hook)
    trainer("transformers", here, max_steps=2, save_steps=1).train()
    trained = SEEN["unpickled"].copy()  # a Trainer's own files come back by torch.load below, never an adapter
    for name in ("adapter_model.bin", "ba_lora_init.pt", "ba_lora_head.pkl"):
        for step in (1, 2):
            torch.save({}, here / "out" / f"checkpoint-{step}" / name)
    SEEN["pickles"].clear()
    resumed = trainer("transformers", here, max_steps=2)
    resumed.train(resume_from_checkpoint=str(here / "out" / "checkpoint-1"))
    SEEN["unpickled"], SEEN["resumed"], SEEN["pickles"] = trained, SEEN["pickles"], []
    adapter = str(here / "out" / "checkpoint-2")
    BaLoraModel.from_pretrained(tiny_llama(), adapter, is_trainable=True)
    codes = [
        balora(["verify", adapter, "--base", str(here / "base")]),
        balora(["export", adapter, "--output", str(here / "out" / "cut"), "--rank", "2"]),
        balora(["export", adapter, "--output", str(here / "out" / "merged"), "--merge", "--base", str(here / "base")]),
    ]
    print(json.dumps({"codes": codes, "before": before, **SEEN}))


if __name__ == "__main__":
    main(sys.argv[1])
