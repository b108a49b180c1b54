"""Counts the setups and writes their tables into docs/scaling.md: `python -m integration.scaling`, a minute.

`--measure` prints what docs/scaling.md says of predictions and measurements instead: minutes.
"""

from __future__ import annotations

import argparse

from .measured import report
from .page import PAGE, counts, tables, with_tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="hold the counts against measurements on this CPU")
    if parser.parse_args().measure:
        report()
        return
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables(counts())), encoding="utf-8")


if __name__ == "__main__":
    main()
