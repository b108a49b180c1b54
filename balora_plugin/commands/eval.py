"""Measure a base and its adapter side by side: tasks, drift, bias; each difference with its paired standard error.

  balora eval outputs/ba-lora --base Qwen/Qwen2.5-0.5B --tasks paper_gsm8k hellaswag --limit 200
  balora eval outputs/ba-lora --base Qwen/Qwen2.5-0.5B --drift held_out.jsonl --output results.json
  balora eval outputs/ba-lora --base base/ --tasks paper_gsm8k --data paper_gsm8k=gsm8k_test.jsonl
  balora eval --base base/ --tasks crows_pairs --data crows_pairs=crows_pairs.csv

Tasks are lm-eval's (--include-path adds your own), the paper's protocols (paper_gsm8k, paper_math, paper_humaneval,
paper_mbpp), crows_pairs and mt_bench. docs/evaluate.md says what each number is. Exit code 1: a model computes NaN.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._models import DTYPES, check_place, load_base, quiet
from ._options import Argument, Option, Several, Values, Words
from ._output import check_directory, show_markdown

if TYPE_CHECKING:
    from ..evaluation.figures import Figure
    from ..evaluation.sides import Side
    from ..export.lora_file import Adapter

    Measure = Callable[[Sequence[Side]], list[Figure]]

NOTHING, MODEL, ADAPTER = "nothing", "model", "adapter"
_LEAST = {"limit": 1, "batch_size": 1, "context": 2, "num_fewshot": 0, "max_new_tokens": 1, "code_megabytes": 64}

HELP = "measure a base and its adapter side by side: tasks, drift, bias"

PARAMETERS = (
    Argument("adapter", required=False, metavar="[ADAPTER]", help="an adapter, or a merged model; none: base alone"),
    Option("--base", required=True, metavar="MODEL", help="the base model: a directory or a hub id"),
    Several("--tasks", metavar="NAME", help="tasks, also joined by commas"),
    Several("--drift", metavar="FILE", help="texts, or .jsonl of messages or prompts"),
    Several("--include-path", metavar="DIR", help="your own lm-eval task files"),
    Several("--data", metavar="TASK[:SPLIT]=FILE", help="rows instead of the hub's (.jsonl, .csv)"),
    Option("--limit", type=int, metavar="N", help="the first N documents of each task and file"),
    Option("--batch-size", type=int, default=1, metavar="N", help="default: 1"),
    Option("--context", type=int, default=512, metavar="N", help="tokens of a --drift document (512)"),
    Option("--num-fewshot", type=int, metavar="N", help="examples in a prompt, instead of the tasks' own"),
    Option("--max-new-tokens", type=int, metavar="N", help="of generated text, instead of the tasks' own"),
    Option("--apply-chat-template", is_flag=True, help="prompts of lm-eval's tasks as chats"),
    Option("--tokenizer", metavar="DIR", help="default: the adapter's where it has one, else the base's"),
    Option("--dtype", type=Words([*DTYPES, "auto"]), help="of the base (default: as it was trained on)"),
    Option("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: an accelerator, or else cpu)"),
    Option("--run-generated-code", is_flag=True, help="allow tasks that run programs the model writes"),
    Option("--code-seconds", type=float, default=10.0, metavar="N", help="a program's time (10)"),
    Option("--code-megabytes", type=int, default=1024, metavar="N", help="a program's memory (1024)"),
    Option("--output", metavar="FILE", help="write results as JSON (answers of mt_bench beside it)"),
    Option("--overwrite", is_flag=True, help="replace what --output has written before"),
)


def run(args: Values) -> int:
    """Runs the subcommand; returns its exit code."""
    _check(args)
    from ..evaluation.sandbox import Limits, limited
    from ..evaluation.table import as_rows, as_table, not_finite

    with quiet(), limited(Limits(args.code_seconds, args.code_megabytes)):
        given = _given(args)
        measures = _planned(args, _tokenizer(args))
        sides = _sides(args, given)
        figures = [figure for measure in measures for figure in measure(sides)]
    names = [side.name for side in sides]
    rows = as_rows(figures, names)
    show_markdown(as_table(rows, names))
    if args.output is not None:
        _write(args, rows, sides)
    broken = not_finite(figures)
    if broken:
        print(f"{broken[0]}: a model computes NaN or inf there: these figures say nothing.")
    return 1 if broken else 0


# --- before a model is loaded


def _check(args: Values) -> None:
    """Refuses what cannot be done, before anything is loaded.

    Raises:
        ValueError: names the argument, its value and what to write.
    """
    args.tasks = list(dict.fromkeys(name for word in args.tasks for name in word.split(",") if name))
    if not args.tasks and not args.drift:
        raise ValueError("nothing is to be measured: name --tasks or a --drift FILE.")
    for key, least in _LEAST.items():
        value = getattr(args, key)
        if value is not None and value < least:
            raise ValueError(f"--{key.replace('_', '-')} {value}: write a number of at least {least}.")
    if not args.code_seconds > 0:
        raise ValueError(f"--code-seconds {args.code_seconds}: write a number above 0.")
    for directory in args.include_path:
        if not os.path.isdir(directory):
            raise ValueError(f"--include-path {directory} is no directory: name one with lm-eval's YAML files.")
    args.data = _data(args.data)
    for own, what in (("crows_pairs", "nyu-mll/crows-pairs' CSV"), ("mt_bench", "FastChat's mt_bench/question.jsonl")):
        if own in args.tasks and "" not in args.data.get(own, {}):
            raise ValueError(f"--tasks {own} reads a file of yours: add --data {own}=FILE ({what}).")
        if own in args.data and own not in args.tasks:
            raise ValueError(f"--data {own}=...: it is not among --tasks: add it there.")
    check_place(args.base)
    _check_place(args)


def _check_place(args: Values) -> None:
    """Refuses an output that would replace something, and a device that is not there."""
    import torch

    if "mt_bench" in args.tasks and args.output is None:
        raise ValueError("--tasks mt_bench writes answers for a judge: say where by --output results.json.")
    if args.output is not None:
        path = Path(args.output)
        check_directory(str(path.parent))
        if path.is_dir():
            raise ValueError(f"--output {args.output} is a directory: name a file, such as {path / 'results.json'}.")
        if path.exists() and not args.overwrite:
            raise ValueError(f"--output {args.output} is there already: name another file, or pass --overwrite.")
    if args.device is None:
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        args.device = "cpu" if there is None else there.type
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {args.device} cannot be used here ({str(error).splitlines()[0]}): try cpu."
        ) from None


def _data(words: Sequence[str]) -> dict[str, dict[str, str]]:
    """Returns {task: {split: file}} of TASK=FILE and TASK:SPLIT=FILE; the split "" is the one that is scored."""
    found: dict[str, dict[str, str]] = {}
    for word in words:
        name, sign, path = word.partition("=")
        task, _, split = name.partition(":")
        if not sign or not task or not path:
            raise ValueError(f"--data {word}: write TASK=FILE, or TASK:SPLIT=FILE.")
        if not os.path.isfile(path):
            raise ValueError(f"--data {word}: there is no file {path}.")
        if split in found.setdefault(task, {}):
            raise ValueError(f"--data {word}: {name} has a file already: name one.")
        found[task][split] = path
    return found


def _tokenizer(args: Values) -> Any:
    from transformers import AutoTokenizer

    named = args.tokenizer
    if named is None:
        own = args.adapter is not None and os.path.isfile(os.path.join(args.adapter, "tokenizer_config.json"))
        named = args.adapter if own else args.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(named)
    except (OSError, ValueError, KeyError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{named} holds no tokenizer ({text}): name its directory by --tokenizer.") from None
    args.tokenizer = named
    return tokenizer


def _planned(args: Values, tokenizer: Any) -> list[Measure]:
    """Reads all data; returns what is to be done with the models."""
    from ..evaluation import crows_pairs, drift, mt_bench
    from ..evaluation.documents import read_documents

    measures: list[Measure] = []
    others = [name for name in args.tasks if name not in (crows_pairs.NAME, mt_bench.NAME)]
    if others:
        measures.append(_of_harness(args, others, tokenizer))
    if crows_pairs.NAME in args.tasks:
        pairs = crows_pairs.read_pairs(args.data[crows_pairs.NAME][""], args.limit)
        measures.append(partial(crows_pairs.crows_figures, pairs, tokenizer=tokenizer, batch_size=args.batch_size))
    if mt_bench.NAME in args.tasks:
        questions = mt_bench.read_questions(args.data[mt_bench.NAME][""], args.limit)
        speaking = mt_bench.Speaking(tokenizer, args.max_new_tokens or mt_bench.NEW_TOKENS)
        measures.append(partial(mt_bench.write_answers, questions, speaking=speaking, directory=_answers(args)))
    for path in args.drift:
        reading = read_documents(path, tokenizer, args.context, args.limit)
        for remark in reading.remarks():
            print(f"note     --drift {path}: {remark}", file=sys.stderr)
        measures.append(partial(drift.drift_figures, path, reading, batch_size=args.batch_size))
    return measures


def _of_harness(args: Values, names: Sequence[str], tokenizer: Any) -> Measure:
    from ..evaluation import harness
    from ..evaluation.sandbox import check_sandbox

    if args.run_generated_code:
        check_sandbox()
    request = harness.Request(
        tasks=tuple(names),
        include=tuple(args.include_path),
        data={name: files for name, files in args.data.items() if name not in ("crows_pairs", "mt_bench")},
        limit=args.limit,
        batch_size=args.batch_size,
        shots=args.num_fewshot,
        chat=args.apply_chat_template,
        run_code=args.run_generated_code,
        new_tokens=args.max_new_tokens,
    )
    if request.chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"--apply-chat-template: the tokenizer {args.tokenizer} has no chat template: leave it out.")
    return partial(harness.run_tasks, harness.load_tasks(request), tokenizer=tokenizer, request=request)


def _answers(args: Values) -> str:
    """Returns the directory of MT-Bench's answers."""
    return str(Path(args.output).with_suffix("")) + "_mt_bench"


@dataclass(frozen=True)
class _Given:
    """What ADAPTER is: nothing, a model of its own, a LoRA as it was read, or another form, which PEFT loads."""

    kind: str  # of NOTHING, MODEL, ADAPTER
    adapter: Adapter | None = None


def _given(args: Values) -> _Given:
    """Looks at ADAPTER, and reads a LoRA's files."""
    from transformers import AutoConfig

    from ..evaluation.sides import check_adapter_form, ordinary_lora

    if args.adapter is None:
        return _Given(NOTHING)
    config = check_adapter_form(args.adapter)
    if config is not None:
        return _Given(ADAPTER, ordinary_lora(args.adapter, config))
    try:
        AutoConfig.from_pretrained(args.adapter)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"ADAPTER {args.adapter} holds neither an adapter_config.json nor a model: {text}") from None
    return _Given(MODEL)


# --- the models


def _sides(args: Values, given: _Given) -> list[Side]:
    """Loads the models that are compared."""
    from ..evaluation.sides import BASE, Side, with_adapter

    if given.kind != ADAPTER:
        sides = [Side(BASE, _placed(args, load_base(args.base, args.dtype or "auto")))]
        return sides if given.kind == NOTHING else [*sides, Side(MODEL, _placed(args, _merged(args)))]
    adapter = given.adapter

    def again() -> Any:
        print("note     the base is loaded twice: this form of adapter cannot be switched off exactly", file=sys.stderr)
        return _base(args, adapter)

    return with_adapter(_base(args, adapter), args.adapter, adapter, again)


def _merged(args: Values) -> Any:
    """Loads ADAPTER as a model of its own."""
    try:
        return load_base(args.adapter, args.dtype or "auto")
    except ValueError as error:
        text = str(error).replace(f"--base {args.adapter}", f"ADAPTER {args.adapter}", 1)
        raise ValueError(text) from None


def _base(args: Values, adapter: Adapter | None) -> Any:
    """Loads the base as the adapter was trained on, and compares it with what is recorded.

    Raises:
        ValueError: it is another one.
    """
    from ..pretrained.identity import BaseIdentity
    from ..pretrained.quantised_experts import dequantise_experts
    from ._bases import compared

    if adapter is None:
        return _placed(args, load_base(args.base, args.dtype or "auto"))
    recorded = BaseIdentity.from_settings(adapter.origin)
    model = load_base(
        args.base,
        args.dtype or ("auto" if recorded is None else recorded.dtype),
        recorded.quantization if recorded is not None and args.dtype is None else None,
        trained=(adapter.origin or {}).get("base_class"),
    )
    compared(args.base, adapter, model, recorded)
    dequantise_experts(model)
    return _placed(args, model)


def _placed(args: Values, model: Any) -> Any:
    """Returns the model on --device; a quantised one stays where it was loaded."""
    return model if getattr(model, "is_quantized", False) else model.to(args.device)


# --- afterwards


def _write(args: Values, rows: Sequence[dict[str, Any]], sides: Sequence[Side]) -> None:
    from importlib.metadata import PackageNotFoundError, version

    from .._version import __version__
    from ..atomic import write_text
    from ..evaluation.table import as_json

    versions = {"balora-plugin": __version__}
    for name in ("torch", "transformers", "peft", "lm_eval"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = ""
    results = {
        "settings": vars(args),
        "versions": versions,
        "dtype": {side.name: str(side.model.dtype).removeprefix("torch.") for side in sides},
        "one_model": len({id(side.model) for side in sides}) == 1,
        "results": as_json(rows),
    }
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote    {args.output}", file=sys.stderr)
    if "mt_bench" in args.tasks:
        print(f"wrote    {_answers(args)}/ (answers for FastChat's judge)", file=sys.stderr)
