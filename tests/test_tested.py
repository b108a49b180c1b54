"""A host whose files, or whose adapter's, have changed since its tests passed is named."""

from __future__ import annotations

import shutil

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
    assert tested.main([]) == 0
    return capsys.readouterr().out.split()


def test_what_has_changed_is_named(copy, capsys):
    assert changed(capsys) == ["llamafactory", "swift"]
    tested.main(["--passed", "swift"])
    assert changed(capsys) == ["llamafactory"]
    tested.main(["--passed", "llamafactory"])
    assert changed(capsys) == []
    checks = copy / "balora_plugin/hosts/swift/checks.py"
    checks.write_text(checks.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert changed(capsys) == ["swift"]
    tested.main(["--passed", "swift"])
    (copy / "balora_plugin/adapter/another.py").write_text("", encoding="utf-8")
    assert changed(capsys) == ["llamafactory", "swift"]


def test_the_makefile_tests_what_is_named():
    makefile = (tested.ROOT / "Makefile").read_text(encoding="utf-8")
    for host in tested.FILES:
        assert f"\ntest-{host}: " in makefile and f"integration.tested --passed {host}\n" in makefile
    assert "$(PYTHON) -m integration.tested)" in makefile
