"""A host whose files, or whose adapter's, have changed since its tests passed is named, and tested by CI."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from integration import tested


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the files that count, and no record."""
    for places in tested.FILES.values():
        for place in places:
            source, target = tested.ROOT / place, tmp_path / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
    monkeypatch.setattr(tested, "KEPT", tmp_path / "tested.json")
    monkeypatch.setattr(tested, "digest", lambda host, whole=tested.digest: whole(host, tmp_path))
    return tmp_path


def changed(capsys):
    capsys.readouterr()
    assert tested.main([]) == 0
    return capsys.readouterr().out.split()


def passed(host):
    return tested.main(["--passed", host, "--of", tested.digest(host)])


def test_what_has_changed_is_named(copy, capsys):
    assert changed(capsys) == ["llamafactory", "swift"]
    assert passed("swift") == 0
    assert "commit integration/tested.json" in capsys.readouterr().out
    assert changed(capsys) == ["llamafactory"]
    passed("llamafactory")
    assert changed(capsys) == []
    checks = copy / "balora_plugin/hosts/swift/checks.py"
    checks.write_text(checks.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert changed(capsys) == ["swift"]
    passed("swift")
    (copy / "balora_plugin/adapter/another.py").write_text("", encoding="utf-8")
    assert changed(capsys) == ["llamafactory", "swift"]


def test_files_that_change_while_the_tests_run_were_not_tested(copy, capsys):
    before = tested.digest("swift")
    (copy / "balora_plugin/hosts/swift/another.py").write_text("", encoding="utf-8")
    assert tested.main(["--passed", "swift", "--of", before]) == 1
    assert "swift: its files were changed while its tests ran" in capsys.readouterr().err
    assert not tested.KEPT.exists()
    with pytest.raises(SystemExit):
        tested.main(["--passed", "swift"])


def test_the_record_is_of_the_known_hosts():
    """Not that it is up to date: where it is not, CI runs the tests themselves."""
    kept = json.loads(tested.KEPT.read_text(encoding="utf-8"))
    assert kept.keys() == tested.FILES.keys() and {len(value) for value in kept.values()} == {32}


def test_the_makefile_tests_what_is_named():
    makefile = (tested.ROOT / "Makefile").read_text(encoding="utf-8")
    for host in tested.FILES:
        assert f"\ntest-{host}: " in makefile and f"integration.tested --digest {host})" in makefile
        assert f"integration.tested --passed {host} --of $$of\n" in makefile
    assert "make test-changed-hosts\n" in (tested.ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_fails_where_the_changed_hosts_cannot_be_found():
    make = ["make", "--no-print-directory", "test-changed-hosts"]
    assert subprocess.run([*make, "PYTHON=false"], cwd=tested.ROOT, capture_output=True).returncode != 0
    assert subprocess.run([*make, "PYTHON=true"], cwd=tested.ROOT, capture_output=True).returncode == 0
