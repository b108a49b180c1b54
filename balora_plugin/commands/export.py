"""Write an adapter in a form to ship: a plain LoRA for any server, one of a smaller rank, or the merged model.

  balora export outputs/ba-lora --output portable --dtype bfloat16
  balora export outputs/ba-lora --output small --rank auto --max-error 0.05
  balora export outputs/ba-lora --output merged --merge --base Qwen/Qwen2.5-0.5B
  balora export raw-pissa --initial raw-pissa/pissa_init --output portable

ADAPTER is a BA-LoRA adapter, any plain LoRA, or a raw PiSSA adapter (PEFT's init_lora_weights="pissa") together with
the adapter it started as. All layers get one rank and one scaling, because servers read r and lora_alpha alone. The
error is that of the update, relative, in the Frobenius norm, over all layers and for the worst.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from ._models import DTYPES, is_quantised, load_base, quiet, size, torch_dtype
from ._output import check_output, writing

if TYPE_CHECKING:
    from ..export.lora_file import Adapter, Errors

HELP = "write an adapter as a plain LoRA, at a smaller rank, or merged into its base"
FAR_FROM_INITIAL = 0.5  # of the initial factors' norm: fine-tuning moves them by percents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this subcommand's arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="directory of the adapter")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="directory to write; nothing is written elsewhere"
    )
    parser.add_argument("--base", metavar="MODEL", help="the full-precision base model: a directory or a hub id")
    parser.add_argument("--rank", metavar="N|auto", type=_rank, help="cut to N, or to the smallest for --max-error")
    parser.add_argument("--max-error", metavar="E", type=_fraction, help="with --rank auto: such as 0.05")
    parser.add_argument("--merge", action="store_true", help="write the merged model (needs --base)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of what is written (default: as the adapter is; merged: as the base's files are)",
    )
    parser.add_argument("--initial", metavar="DIR", help="the adapter that a raw PiSSA adapter started as")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --output")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns its exit code."""
    _check(args)
    check_output(args.output, [args.adapter, args.initial, args.base], overwrite=args.overwrite)
    with quiet():
        adapter = _read(args)
        if args.merge:
            _merge(args, adapter)
        else:
            _export(args, adapter)
    if args.dry_run:
        print("dry run: nothing was written")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.rank == "auto" and args.max_error is None:
        raise ValueError("--rank auto needs --max-error E: the relative error of the update to allow, such as 0.05.")
    if args.max_error is not None and args.rank != "auto":
        raise ValueError(f"--max-error {args.max_error:g} needs --rank auto.")
    if args.merge and args.base is None:
        raise ValueError("--merge needs --base MODEL: the full-precision base model.")
    if args.merge and args.rank is not None:
        raise ValueError(f"--rank {args.rank} with --merge: a merged model has no rank; leave one of them out.")


def _read(args: argparse.Namespace) -> Adapter:
    """Reads the adapter, and converts a raw PiSSA one."""
    from ..export import lora_file, residual_start

    adapter = lora_file.read_adapter(args.adapter)
    start = residual_start.raw_start(adapter)
    print(f"reads    {args.adapter}: {_describe(adapter, start)}")
    if args.initial is None:
        if start is not None:
            raise ValueError(
                f"{args.adapter!r} is a raw {start} adapter: its factors belong to a residual base, not to the "
                "original one. Pass --initial DIR, the adapter as it was saved before training "
                "(path_initial_model_for_weight_conversion)."
            )
        return adapter
    if adapter.settings is not None:
        raise ValueError(
            f"--initial {args.initial}: {args.adapter!r} is a BA-LoRA adapter, nothing is to be converted."
        )
    initial = lora_file.read_adapter(args.initial)
    converted = residual_start.converted(adapter, initial)
    moved = residual_start.moved_from(adapter, initial)
    print(f"converts a raw {start or 'adapter'}; training moved its factors by {moved:.2g} of the initial ones")
    if moved > FAR_FROM_INITIAL:
        print(f"warning: that is far for fine-tuning: is {args.initial} what this adapter started as?")
    return converted


def _describe(adapter: Adapter, start: str | None) -> str:
    kind = "BA-LoRA" if adapter.settings is not None else f"raw {start}" if start else "plain LoRA"
    experts = sum(update.experts > 1 for update in adapter.updates.values())
    stacks = f", {experts} of them stacks of experts" if experts else ""
    others = f", {len(adapter.others)} tensors of modules_to_save" if adapter.others else ""
    return f"{kind}, rank {adapter.rank}, {len(adapter.updates)} matrices{stacks}{others}, {_name(adapter.dtype)}"


def _export(args: argparse.Namespace, adapter: Adapter) -> None:
    from ..adapter.saved.card import VLLM_DEFAULT_RANK
    from ..export import lora_file

    dtype = None if args.dtype is None else torch_dtype(args.dtype)
    if args.base is not None:
        _check_base(args, adapter)
        adapter.config.base_model_name_or_path = args.base
    if isinstance(args.rank, int) and args.rank > adapter.rank:
        raise ValueError(f"--rank {args.rank} is above the adapter's own {adapter.rank}: leave --rank out.")
    if args.rank == "auto":
        changed, errors = lora_file.smallest(adapter, args.max_error, dtype)
    else:
        changed = lora_file.one_rank(adapter, args.rank, dtype)
        errors = lora_file.errors(changed, adapter)
    rank = changed.config.r
    written = size(lora_file.size_of(lora_file.state_dict(changed).values()))
    print(f"writes   {args.output}: plain LoRA, rank {rank}, {_name(changed.dtype)}, {written}")
    _print_errors(errors)
    if rank > VLLM_DEFAULT_RANK:
        print(f"note     vLLM takes ranks up to {VLLM_DEFAULT_RANK} unless it is told --max-lora-rank, here {rank}")
    if changed.others:
        print("note     vLLM takes no modules_to_save: for it, use --merge")
    if args.dry_run:
        return
    with writing(args.output, overwrite=args.overwrite) as directory:
        lora_file.write_adapter(changed, directory, _metadata(adapter, errors))
        _write_card(directory, changed, errors)


def _merge(args: argparse.Namespace, adapter: Adapter) -> None:
    import torch
    from transformers import AutoConfig

    from ..export.lora_file import size_of
    from ..export.merge import attach, merge

    if is_quantised(args.base):
        raise ValueError(
            f"--base {args.base} is quantised: rounding the merged weights to 4 or 8 bits swallows small updates. Give "
            "the full-precision model; quantise the merged one afterwards."
        )
    stored = _name(getattr(AutoConfig.from_pretrained(args.base), "dtype", None) or torch.float32)
    dtype = torch_dtype(args.dtype or (stored if stored in DTYPES else "float32"))
    model = _check_base(args, adapter, "float32")
    merged = merge(attach(model, adapter), [dtype, torch.bfloat16])
    written = merged.model.to(dtype)
    print(f"writes   {args.output}: merged model, {_name(dtype)}, {size(size_of(written.state_dict().values()))}")
    _print_errors(merged.errors[dtype])
    if dtype != torch.bfloat16:
        print(f"note     a cast to bfloat16 would lose {merged.errors[torch.bfloat16].total:.2g} of the update")
    if merged.errors[dtype].total > 0.05:
        print(
            "note     the update is small beside the weights' rounding: --dtype float32 keeps it, and so does serving"
        )
        print("         the adapter without merging")
    if args.dry_run:
        return
    with writing(args.output, overwrite=args.overwrite) as directory:
        written.save_pretrained(directory)
        _save_tokenizer(directory, [args.adapter, args.base])
        _write_card(directory, adapter, merged.errors[dtype], merged_into=args.base)


def _check_base(args: argparse.Namespace, adapter: Adapter, dtype: str | None = None) -> Any:
    """Loads --base and compares it with what is known of the one that the adapter was trained on."""
    from ..checkpoint.location import AdapterFiles
    from ..export import lora_file, residual_start
    from ..pretrained import probe
    from ..pretrained.identity import BaseIdentity, base_identity, compare

    kind = lora_file.task_type_of(adapter.config)
    if kind != "CAUSAL_LM":
        raise ValueError(
            f"task_type={kind!r} in {args.adapter!r}: only causal language models are loaded here. Leave --base out, "
            "or merge with PEFT: PeftModel.from_pretrained(model, adapter).merge_and_unload()."
        )
    recorded = BaseIdentity.from_settings(adapter.origin)
    model = load_base(args.base, dtype or (recorded.dtype if recorded is not None else "auto"))
    here = base_identity(model)
    verdict = compare(recorded, here)
    distance = None
    undecided = verdict in ("unclear", "config")
    stored = probe.stored_probe(AdapterFiles(args.adapter), adapter.settings) if undecided else None
    if stored is not None:
        logits = probe.base_logits(model)
        distance = None if stored.base is None or logits is None else probe.discrepancy(logits, stored.base)
    if verdict == "other" or (distance is not None and distance > probe.TOLERANCE_QUANTISED):
        raise ValueError(
            f"--base {args.base}, {here}, is not the base that {args.adapter!r} was trained on, {recorded}: give that "
            "one (balora verify shows the difference)."
        )
    if args.initial is not None:
        residual_start.check_start(model, lora_file.read_adapter(args.initial), str(adapter.config.init_lora_weights))
    text = {
        "same": "the one it was trained on",
        "config": "the weights it was trained on, under another config",
        "dtype": "the one it was trained on, in another dtype",
        "unknown": "no hash of it is recorded: not compared" if args.initial is None else "the initial adapter's own",
        "unclear": f"another form of the one it was trained on, {recorded}",
    }
    print(f"base     {args.base}: {text[verdict]}{'' if distance is None else f', logits {distance:.2g} apart'}")
    return model


def _metadata(adapter: Adapter, errors: Errors) -> dict[str, str]:
    """Returns where an exported adapter comes from, for the header of its tensor file: servers need no side files."""
    from .._version import __version__

    origin = adapter.origin or {}
    keys = ("base_sha256", "base_dtype", "base_quantization", "base_digests")
    values = {"exported_by": f"balora-plugin {__version__}", "error": errors.total}
    return {"balora": json.dumps({**values, **{key: origin.get(key) for key in keys}})}


def _print_errors(errors: Errors) -> None:
    worst = ", ".join(f"{name} {error:.2g}" for name, error in errors.worst())
    print(f"error    {errors.total:.2g} of the update in total; worst layers: {worst}")


def _write_card(directory: str, adapter: Adapter, errors: Errors, merged_into: str | None = None) -> None:
    from ..export.card import exported

    text = exported(adapter, errors, merged_into=merged_into)
    with open(os.path.join(directory, "README.md"), "w", encoding="utf-8") as file:
        file.write(text)


def _save_tokenizer(directory: str, sources: list[str]) -> None:
    """Saves the tokenizer that was saved with the adapter, else the base's."""
    from transformers import AutoTokenizer

    for source in sources:
        if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "tokenizer_config.json")):
            continue
        AutoTokenizer.from_pretrained(source).save_pretrained(directory)
        return
    print("note     neither the adapter nor the base holds a tokenizer: none was written")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _rank(text: str) -> int | str:
    if text == "auto":
        return text
    if text.isdigit() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no rank: write a whole number >= 1, or auto")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no relative error: write a number between 0 and 1, such as 0.05")
    return value
