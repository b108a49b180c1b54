"""Tasks of lm-eval, ours and the user's among them: loaded before any model, run on each side, a value a document."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..findings import how_to_install
from .calibration import ECE, choice_sums
from .diversity import diversity_figures
from .figures import MEAN, Aggregate, Figure
from .sides import Side

TASKS = Path(__file__).parent / "tasks"
RUN_CODE = "--run-generated-code"
_SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


@dataclass(frozen=True)
class Request:
    """What is asked of lm-eval.

    `data`: by task, by split, the file that takes the place of the task's own data; the split "" is the one that is
    scored.
    """

    tasks: tuple[str, ...]
    include: tuple[str, ...] = ()
    data: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 1
    shots: int | None = None
    chat: bool = False
    run_code: bool = False
    new_tokens: int | None = None


@dataclass(frozen=True)
class Loaded:
    """lm-eval's task objects, groups resolved, with their data, and the manager that knows their files."""

    tasks: tuple[Any, ...]
    manager: Any


def load_tasks(request: Request) -> Loaded:
    """Returns the tasks that are asked for.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no such task, data that are not here, or a task that runs generated code without leave.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(f"--tasks needs lm-eval ({error}): {how_to_install('eval')}.") from None
    with _calm():
        include = [str(TASKS), *request.include]
        manager = TaskManager(include_path=include, include_defaults=False)
        if any(manager.task_index.get(name, {}).get("type") != "task" for name in request.tasks):
            manager = TaskManager(include_path=include)  # indexes some thousand files: half a minute on a slow disk
        _check_names(request, manager)
        tasks = [task for name in request.tasks for task in _loaded(name, request, manager)]
    _check_code(tasks, request)
    return Loaded(tuple(tasks), manager)


def _check_names(request: Request, manager: Any) -> None:
    for name in request.tasks:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [*manager.all_tasks, "crows_pairs", "mt_bench"], n=3)
            hint = f": did you mean {', '.join(near)}?" if near else ""
            where = f" or in {', '.join(request.include)}" if request.include else "; --include-path DIR names your own"
            raise ValueError(f"--tasks {name}: there is no such task in lm-eval{where}{hint}")
    for name in request.data:
        kind = manager.task_index.get(name, {}).get("type")
        if name not in request.tasks or kind != "task":
            why = "it is not among --tasks" if name not in request.tasks else f"it is a {kind}, which holds other tasks"
            raise ValueError(f"--data {name}=...: {why}: name a task of --tasks.")


def _check_code(tasks: Sequence[Any], request: Request) -> None:
    unsafe = [task.config.task for task in tasks if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not request.run_code:
        raise ValueError(
            f"--tasks {unsafe[0]} runs programs that the model writes, as this user, on this machine: write {RUN_CODE} "
            "to allow it (in a container without network, best)."
        )


def _loaded(name: str, request: Request, manager: Any) -> list[Any]:
    """Returns the tasks of a name, with --data in the place of their own."""
    changes = _local(name, request, manager) if name in request.data else {}
    try:
        return list(_leaves(manager.load_config({"task": name, **changes})))
    except Exception as error:  # a task's own code, its data's reader, the hub's client
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        instead = f"--data {name}=FILE names a file of its rows" if not changes else "look at the file's rows"
        paper = next((p for p in ("humaneval", "mbpp", "math") if p in name and not name.startswith("paper_")), None)
        also = f"; paper_{paper} needs nothing but its data" if paper else ""
        raise ValueError(f"--tasks {name} does not load here ({text}): {instead}{also}.") from None


def _leaves(loaded: Mapping[Any, Any]) -> Iterator[Any]:
    for each in loaded.values():
        if isinstance(each, Mapping):
            yield from _leaves(each)
        else:
            yield each


def _local(name: str, request: Request, manager: Any) -> dict[str, Any]:
    """Returns what makes a task read the files of --data.

    Raises:
        ValueError: a split that the task needs, or one that it has not.
    """
    from lm_eval.utils import load_yaml_config

    config = load_yaml_config(manager.task_index[name]["yaml_path"], mode="full")
    splits = {key: config[key] for key in _SPLITS if config.get(key)}
    scored = splits.get("test_split") or splits.get("validation_split")
    if scored is None:
        raise ValueError(f"--data {name}=...: the task names neither a test_split nor a validation_split.")
    files = {split or scored: os.path.abspath(path) for split, path in request.data[name].items()}
    odd = next((split for split in files if split not in splits.values()), None)
    if odd is not None:
        raise ValueError(f"--data {name}:{odd}=...: the task has the splits {', '.join(sorted(set(splits.values())))}.")
    shots = config.get("num_fewshot") or 0
    shots = request.shots if request.shots is not None and config.get("num_fewshot") != 0 else shots
    source = splits.get("fewshot_split") or splits.get("training_split") or splits.get("validation_split") or scored
    if shots and source not in files and not (config.get("fewshot_config") or {}).get("samples"):
        raise ValueError(
            f"--data {name}=...: the task shows {shots} examples of its split {source}: add "
            f"--data {name}:{source}=FILE, or --num-fewshot 0."
        )
    if scored not in files:
        raise ValueError(f"--data {name}=FILE is missing: it takes the place of the split {scored}, which is scored.")
    kinds = {"csv" if path.endswith(".csv") else "json" for path in files.values()}
    if len(kinds) > 1:
        raise ValueError(f"--data {name}: some files are CSV and some JSON: give all in one form.")
    return {
        "dataset_path": kinds.pop(),
        "dataset_name": None,
        "custom_dataset": None,
        "dataset_kwargs": {"data_files": files},
        **{key: None for key, split in splits.items() if split not in files},
    }


def run_tasks(loaded: Loaded, sides: Sequence[Side], tokenizer: Any, request: Request) -> list[Figure]:
    """Runs the tasks on each side; returns their metrics, calibration of choices and variety of what is generated."""
    from lm_eval.evaluator import simple_evaluate

    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with _calm():
        for side in sides:
            model = _language_model(side, tokenizer, request.batch_size)
            _check_lengths(loaded.tasks, model.max_length, request)
            with side.active():
                result = simple_evaluate(
                    model=model,
                    tasks=list(loaded.tasks),
                    task_manager=loaded.manager,
                    num_fewshot=request.shots,
                    limit=request.limit,
                    bootstrap_iters=0,
                    gen_kwargs=None if request.new_tokens is None else {"max_gen_toks": request.new_tokens},
                    apply_chat_template=request.chat,
                    confirm_run_unsafe_code=request.run_code,
                )
            samples[side.name] = result["samples"]
    return [
        figure
        for task in loaded.tasks
        for figure in _figures(task, {side: each[task.config.task] for side, each in samples.items()})
    ]


def _language_model(side: Side, tokenizer: Any, batch_size: int) -> Any:
    """Returns lm-eval's wrapper of a side's model."""
    from lm_eval.models.huggingface import HFLM

    model = side.model
    # it would tie what modules_to_save trained apart; what belongs together is tied since the model was loaded
    model.tie_weights = lambda *_, **__: None
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    finally:
        del model.tie_weights


def _check_lengths(tasks: Sequence[Any], longest: int, request: Request) -> None:
    """Refuses answers for which the model has no room.

    Raises:
        ValueError: names the task and --max-new-tokens.
    """
    for task in tasks:
        if task.OUTPUT_TYPE != "generate_until":
            continue
        wanted = request.new_tokens or (task.config.generation_kwargs or {}).get("max_gen_toks") or 0
        if wanted >= longest:
            raise ValueError(
                f"--tasks {task.config.task} asks for up to {wanted} new tokens, and the model has room for {longest} "
                f"in all: write --max-new-tokens {longest // 2}, or less."
            )


def _figures(task: Any, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Figure]:
    """Returns the figures of one task from lm-eval's samples, of each side."""
    name = task.config.task
    first = next(iter(samples.values()))
    for shown in dict.fromkeys(sample["filter"] for sample in first):
        chosen = {
            side: sorted((s for s in each if s["filter"] == shown), key=lambda s: s["doc_id"])
            for side, each in samples.items()
        }
        for metric in next(iter(chosen.values()))[0]["metrics"]:
            label = metric if shown == "none" else f"{metric} ({shown})"
            values = {side: [sample[metric] for sample in each] for side, each in chosen.items()}
            better = task.higher_is_better().get(metric)
            yield Figure(name, label, values, _aggregate(task.aggregation().get(metric)), better)
    once = {side: [s for s in each if s["filter"] == first[0]["filter"]] for side, each in samples.items()}
    once = {side: sorted(each, key=lambda s: s["doc_id"]) for side, each in once.items()}
    if task.OUTPUT_TYPE == "multiple_choice":
        yield from _calibration(name, once)
    if task.OUTPUT_TYPE == "generate_until":
        yield from diversity_figures(name, {side: [s["resps"][0][0] for s in each] for side, each in once.items()})


def _aggregate(function: Callable[..., Any] | None) -> Aggregate:
    from lm_eval.api.metrics import mean

    return MEAN if function is None or function is mean else Aggregate(lambda values: float(function(list(values))))


def _calibration(name: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Figure]:
    """Returns the calibration error of a choice between answers, where the right one is known by its number."""
    first = next(iter(samples.values()))
    if not all(isinstance(s["target"], int) and 0 <= s["target"] < len(s["filtered_resps"]) for s in first):
        return
    bins = {
        side: [choice_sums([float(each[0]) for each in s["filtered_resps"]], s["target"]) for s in each_side]
        for side, each_side in samples.items()
    }
    yield Figure(name, "ece", bins, ECE, better=False)


@contextmanager
def _calm() -> Iterator[None]:
    """Keeps lm-eval's and datasets' log lines from the user; errors still show."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
