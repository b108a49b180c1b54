"""Takes every architecture through the journey and writes docs/architectures.md: `python -m integration.models`.

Names after it are the families to run; the table is written when all have run.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import transformers

from .families import CAUSAL_LM, CLASSIFIER, CLASSIFIERS, LANGUAGE_MODELS
from .journey import Outcome, travel
from .table import PAGE, page


def main() -> int:
    """Runs the journeys; returns 1 where one found something wrong."""
    transformers.logging.set_verbosity_error()
    asked = sys.argv[1:]
    todo = [(CAUSAL_LM, name) for name in LANGUAGE_MODELS] + [(CLASSIFIER, name) for name in CLASSIFIERS]
    todo = [(task, name) for task, name in todo if not asked or name in asked]
    outcomes: list[Outcome] = []
    wrong = 0
    for number, (task, name) in enumerate(todo, 1):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes.append(travel(name, task, Path(folder)))
                said = outcomes[-1].targets or f"refused: {outcomes[-1].why}"
            except Exception as error:
                wrong += 1
                said = f"WRONG: {type(error).__name__}: {error}"
        print(f"[{number}/{len(todo)}] {task} {name} ({time.perf_counter() - began:.0f} s): {said}", flush=True)
    if not asked and not wrong:
        PAGE.write_text(page(outcomes), encoding="utf-8")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
