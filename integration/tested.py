"""Which hosts with an environment of their own have changed since their tests passed: `python -m integration.tested`.

`make test-swift` and `make test-llamafactory` write what they passed on to `tested.json`, which is committed and
written by nothing else; `make test-changed-hosts`, which CI runs, tests those whose files are others now. The standard
library alone: it asks before an environment is made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).with_name("tested.json")
_SHARED = ("balora_plugin/hosts/__init__.py", "balora_plugin/adapter")
# what a host's tests depend on most; the rest of the package has tests that every CI run makes
FILES = {
    "llamafactory": (
        "balora_plugin/hosts/llamafactory",
        *_SHARED,
        "requirements/llamafactory.txt",
        "integration/test_llamafactory.py",
    ),
    "swift": (
        "balora_plugin/hosts/swift",
        *_SHARED,
        "requirements/swift.txt",
        "integration/test_swift.py",
        "integration/swift_run.py",
    ),
}


def digest(host: str, root: Path = ROOT) -> str:
    """Returns a digest of a host's files, by their paths and bytes."""
    found = hashlib.sha256()
    for place in FILES[host]:
        path = root / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            data = file.read_bytes()
            found.update(f"{file.relative_to(root).as_posix()} {len(data)}\n".encode() + data)
    return found.hexdigest()[:32]


def kept() -> dict[str, str]:
    """Returns by host the digest that its tests passed on."""
    return dict(json.loads(KEPT.read_text(encoding="utf-8"))) if KEPT.is_file() else {}


def keep(host: str, of: str) -> int:
    """Keeps that a host's tests passed on the files of this digest; 1 where other files lie there now."""
    if of != digest(host):
        print(f"{host}: its files were changed while its tests ran: run them again", file=sys.stderr)
        return 1
    before = kept()
    if before.get(host) != of:
        KEPT.write_text(json.dumps({**before, host: of}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{host}: passed; commit integration/{KEPT.name}, else the next CI run tests it again")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Prints the hosts that were changed, a line each, or a host's digest, or keeps that one has passed."""
    made = argparse.ArgumentParser(prog="python -m integration.tested", description=__doc__)
    made.add_argument("--digest", choices=sorted(FILES), help="print the digest of this host's files")
    made.add_argument("--passed", choices=sorted(FILES), help="keep that this host's tests have passed; needs --of")
    made.add_argument("--of", help="the digest from before its tests ran")
    options = made.parse_args(arguments)
    if options.passed and not options.of:
        made.error("--passed needs --of")
    if options.passed:
        return keep(options.passed, options.of)
    if options.digest:
        print(digest(options.digest))
        return 0
    before = kept()
    for host in sorted(FILES):
        if before.get(host) != digest(host):
            print(host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
