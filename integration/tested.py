"""Which hosts with an environment of their own have changed since their tests passed: `python -m integration.tested`.

`make test-swift` and `make test-llamafactory` write what they passed on to `tested.json`, which is committed;
`make test-changed-hosts` runs those whose files are others now. The standard library alone: it asks before an
environment is made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).with_name("tested.json")
ADAPTER = "balora_plugin/adapter"
# what a host's tests depend on most; the rest of the package has tests that every CI run makes
FILES = {
    host: (f"balora_plugin/hosts/{host}", ADAPTER, f"requirements/{host}.txt", f"integration/test_{host}.py")
    for host in ("llamafactory", "swift")
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


def main(arguments: list[str] | None = None) -> int:
    """Prints the hosts that were changed, a line each, or keeps that one has passed."""
    made = argparse.ArgumentParser(prog="python -m integration.tested", description=__doc__)
    made.add_argument("--passed", choices=sorted(FILES), help="keep that this host's tests have passed")
    options = made.parse_args(arguments)
    before = kept()
    if options.passed:
        found = {**before, options.passed: digest(options.passed)}
        KEPT.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    for host in sorted(FILES):
        if before.get(host) != digest(host):
            print(host)
    return 0


if __name__ == "__main__":
    sys.exit(main())
