"""Write an adapter in a form to ship: a plain LoRA for any server, one of a smaller rank, or the merged model.

  balora export outputs/ba-lora --output portable --dtype bfloat16
  balora export outputs/ba-lora --output small --rank auto --max-error 0.05 --base Qwen/Qwen2.5-0.5B
  balora export outputs/ba-lora --output merged --merge --base Qwen/Qwen2.5-0.5B
  balora export raw-pissa --initial raw-pissa/pissa_init --output portable

ADAPTER is a BA-LoRA adapter, any plain LoRA, or a raw PiSSA adapter (PEFT's init_lora_weights="pissa") together with
the adapter it started as. All layers get one rank and one scaling, because servers read r and lora_alpha alone.

With --base, what is lost is measured on predictions: KL(the adapter || what is written), of the probe's tokens or a
text (--data), beside what training moved, KL(the adapter || the base); where that is no more than rounding, the error
of the weights decides: the update's, relative, in the Frobenius norm, over all layers and for the worst.

Merging is for causal language models. A classifier merges with PEFT: PeftModel.from_pretrained(model, ADAPTER), of a
model loaded with AutoModelForSequenceClassification, and its merge_and_unload().
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import click

from ..checkpoint.rules import LARGEST_RANK
from ._bases import MERGE_INTO, base_of, warn_of_mismatch
from ._models import DTYPES, quiet, size, torch_dtype
from ._options import Argument, Option, Values, Words
from ._output import check_output, writing

if TYPE_CHECKING:
    from ..export.lora_file import Adapter
    from ..export.prediction import Lost, Yardstick

HELP = "write an adapter as a plain LoRA, at a smaller rank, or merged into its base"
FAR_FROM_INITIAL = 0.5  # of the initial factors' norm: fine-tuning moves them by percents


def _rank(text: str) -> int | str:
    if text == "auto":
        return text
    if re.fullmatch(r"[1-9][0-9]{0,9}", text) and int(text) <= LARGEST_RANK:
        return int(text)
    raise click.BadParameter(f"{text[:40]!r} is no rank: write a whole number from 1 to {LARGEST_RANK}, or auto")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise click.BadParameter(f"{text!r} is no relative error: write a number between 0 and 1, such as 0.05")
    return value


PARAMETERS = (
    Argument("adapter", metavar="ADAPTER", help="directory of the adapter"),
    Option("--output", required=True, metavar="DIR", help="directory to write; nothing is written elsewhere"),
    Option(
        "--base",
        metavar="MODEL",
        help="the base model, a directory or a hub id: measures what is lost (causal language models; of a classifier "
        "the weights' error alone is measured, without --base)",
    ),
    Option("--rank", type=_rank, metavar="N|auto", help="cut to N, or to the smallest for --max-error"),
    Option(
        "--max-error",
        type=_fraction,
        metavar="E",
        help="with --rank auto, such as 0.05: of the KL that training moved (without --base: of the update's norm)",
    ),
    Option("--data", metavar="FILE", help="measure on this text instead of the probe (needs --base)"),
    Option("--merge", is_flag=True, help="write the merged model of a causal language model (needs --base)"),
    Option(
        "--merge-into",
        type=Words(MERGE_INTO),
        help="of an adapter trained over a quantised base: into those weights, dequantised (trained, the default), or "
        "into the full-precision ones (full), which is another model",
    ),
    Option(
        "--dtype",
        type=Words(DTYPES),
        help="of what is written (default: as the adapter is; merged: as the base's files are)",
    ),
    Option("--initial", metavar="DIR", help="the adapter that a raw PiSSA adapter started as"),
    Option("--dry-run", is_flag=True, help="say what would be written, and write nothing"),
    Option("--overwrite", is_flag=True, help="replace what is in --output"),
)


def run(args: Values) -> int:
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


def _check(args: Values) -> None:
    if args.rank == "auto" and args.max_error is None:
        raise ValueError("--rank auto needs --max-error E: the part to lose of what training moved, such as 0.05.")
    if args.max_error is not None and args.rank != "auto":
        raise ValueError(f"--max-error {args.max_error:g} needs --rank auto.")
    if args.data is not None and args.base is None:
        raise ValueError(f"--data {args.data} needs --base MODEL: predictions are measured on the base model.")
    if args.data is not None and not os.path.isfile(args.data):
        raise ValueError(f"--data {args.data} is no file: give a file of text like the training data's.")
    if args.merge_into is not None and not args.merge:
        raise ValueError(f"--merge-into {args.merge_into} needs --merge.")
    if args.merge and args.base is None:
        raise ValueError("--merge needs --base MODEL: the base model.")
    if args.merge and args.rank is not None:
        raise ValueError(f"--rank {args.rank} with --merge: a merged model has no rank; leave one of them out.")


def _read(args: Values) -> Adapter:
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


def _export(args: Values, adapter: Adapter) -> None:
    from ..export import lora_file, reduced
    from ..export.attach import attach
    from ..export.card import exported
    from ..export.prediction import Lost

    dtype = None if args.dtype is None else torch_dtype(args.dtype)
    if isinstance(args.rank, int) and args.rank > adapter.rank:
        raise ValueError(f"--rank {args.rank} is above the adapter's own {adapter.rank}: leave --rank out.")
    measure = None
    if args.base is not None:
        base = base_of(args, adapter)
        adapter.config.base_model_name_or_path = args.base
        model = attach(base.model, adapter)
        warn_of_mismatch(args, adapter, base, model)
        measure = _yardstick(args, model)
    if args.rank == "auto":
        by_predictions = measure.relative_loss if measure is not None and measure.clear else None
        changed = reduced.smallest(adapter, args.max_error, dtype, by_predictions)
    else:
        changed = reduced.one_rank(adapter, args.rank, dtype)
    lost = Lost(reduced.errors(changed, adapter), None if measure is None else measure.loss_of(changed))
    written = size(lora_file.size_of(lora_file.state_dict(changed).values()))
    print(f"writes   {args.output}: plain LoRA, rank {changed.config.r}, {_name(changed.dtype)}, {written}")
    _print_lost(args, lost, adapter)
    _print_what_servers_take(changed)
    if args.dry_run:
        return
    with writing(args.output, overwrite=args.overwrite) as directory:
        lora_file.write_adapter(changed, directory, _origin(adapter, lost))
        origin = adapter.origin or {}
        how = {"quantization": origin.get("base_quantization"), "trained": origin.get("base_class")}
        _write_card(directory, exported(changed, lost, **how))


def _merge(args: Values, adapter: Adapter) -> None:
    import torch
    from transformers import AutoConfig

    from ..export.attach import attach
    from ..export.card import exported
    from ..export.lora_file import size_of
    from ..export.merge import merge, save
    from ..export.prediction import Lost
    from ..pretrained.backbone import is_multimodal_class

    base = base_of(args, adapter)
    stored = _name(getattr(AutoConfig.from_pretrained(args.base), "dtype", None) or torch.float32)
    dtype = torch_dtype(args.dtype or (stored if stored in DTYPES else "float32"))
    model = attach(base.model, adapter)
    warn_of_mismatch(args, adapter, base, model)
    measure = _yardstick(args, model)
    merged = merge(model, dtype)
    rounded = merged.model.to(dtype).float()  # what is measured is what is written, not the arithmetic of a dtype
    lost = Lost(merged.errors, None if measure is None else measure.loss(rounded))
    written = rounded.to(dtype)
    print(f"writes   {args.output}: merged model, {_name(dtype)}, {size(size_of(written.state_dict().values()))}")
    _print_lost(args, lost, adapter)
    if lost.much and dtype != torch.float32:
        print("note     rounding the weights takes much of what was trained: --dtype float32 keeps it, and so does")
        print("         serving the adapter without merging")
    if args.dry_run:
        return
    trained = (adapter.origin or {}).get("base_class")
    with writing(args.output, overwrite=args.overwrite) as directory:
        save(written, directory)
        tokenizer = _tokenizer(args)
        if tokenizer is None:
            print("note     neither the adapter nor the base holds a tokenizer: none was written")
        else:
            tokenizer.save_pretrained(directory)
        if is_multimodal_class(trained):
            print("note     images need the processor's files too: copy them from the base's directory")
        quantization = base.quantization if base.dequantised else None
        _write_card(
            directory, exported(adapter, lost, merged_into=args.base, quantization=quantization, trained=trained)
        )


def _yardstick(args: Values, model: Any) -> Yardstick | None:
    """Returns what measures predictions on --data or the probe's tokens; `model` is the base with the adapter."""
    from ..export.prediction import Yardstick, probe_sample, text_sample

    if args.data is None:
        sample = probe_sample(model.get_base_model())
        return None if sample is None else Yardstick(model, sample)
    tokenizer = _tokenizer(args)
    if tokenizer is None:
        raise ValueError(
            f"--data {args.data} needs a tokenizer: neither {args.adapter} nor --base {args.base} has one."
        )
    return Yardstick(model, text_sample(args.data, tokenizer))


def _origin(adapter: Adapter, lost: Lost) -> dict[str, Any]:
    """Returns where an exported adapter comes from, for the header of its tensor file: servers need no side files."""
    from .._version import __version__

    origin = adapter.origin or {}
    keys = ("base_class", "base_sha256", "base_dtype", "base_quantization", "base_digests")
    values = {"exported_by": f"balora-plugin {__version__}", "error": lost.errors.total}
    if lost.loss is not None:
        values |= {"kl": lost.loss.kl, "kl_moved": lost.loss.moved}
    return {**values, **{key: origin.get(key) for key in keys}}


def _print_lost(args: Values, lost: Lost, adapter: Adapter) -> None:
    if lost.loss is not None:
        print(f"kl       {lost.loss}")
    worst = ", ".join(f"{name} {error:.2g}" for name, error in lost.errors.worst())
    print(f"error    {lost.errors.total:.2g} of the update's Frobenius norm in total; worst layers: {worst}")
    measured = lost.loss is not None and lost.loss.clear
    if not measured and lost.errors.total:
        what = f"--max-error {args.max_error:g} was held against it" if args.rank == "auto" else "it says little"
        remedy = ": --base MODEL measures their KL" if lost.loss is None and adapter.language else ""
        print(f"note     that is the weights' error, not the predictions', and {what}{remedy}")


def _print_what_servers_take(adapter: Adapter) -> None:
    from ..adapter.saved.card import VLLM_DEFAULT_RANK

    rank = adapter.config.r
    if rank > VLLM_DEFAULT_RANK:
        print(f"note     vLLM takes ranks up to {VLLM_DEFAULT_RANK} unless it is told --max-lora-rank, here {rank}")
    if adapter.originals:
        print("note     the file holds the base's own embedding or head too, as PEFT saves them where tokens were")
        print("         added, or where they are adapted. PEFT loads it on a base whose embedding is as large;")
        print("         servers take no such adapter: for them, use --merge")
    elif adapter.others:
        merge = "use --merge" if adapter.language else "merge with PEFT"
        print(f"note     vLLM takes no modules_to_save: for it, {merge}")


def _write_card(directory: str, text: str) -> None:
    with open(os.path.join(directory, "README.md"), "w", encoding="utf-8") as file:
        file.write(text)


def _tokenizer(args: Values) -> Any:
    """Returns the tokenizer that was saved with the adapter, else the base's, or None."""
    from transformers import AutoTokenizer

    for source in (args.adapter, args.base):
        if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "tokenizer_config.json")):
            continue
        return AutoTokenizer.from_pretrained(source)
    return None


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
