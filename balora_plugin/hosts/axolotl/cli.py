"""`axolotl ba-lora`: train a YAML without the plugins line, write a starter, migrate a YAML, print the block's schema.

Axolotl finds subcommands by entry point but no plug-ins: its own `train` needs the `plugins:` line that `ba-lora train`
adds. Nothing here imports Axolotl, or torch, but `train`: `balora axolotl` is the same without Axolotl's own start.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import yaml

from ... import atomic
from .migrate import PLUGIN, migrate
from .starter import schema as schema_text
from .starter import starter


@click.group("ba-lora")
def main() -> None:
    """BA-LoRA: train a YAML, write a starter, migrate a LoRA's YAML, print the schema."""


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def train(config: Path, options: tuple[str, ...]) -> None:
    """Add the plugins line to CONFIG, write the result beside the output, and hand it to `axolotl train`."""
    resolved = write_resolved(config)
    click.echo(f"wrote {resolved}: use it for merge-lora, inference, evaluate and preprocess too")
    click.echo(f"axolotl train {resolved} {' '.join(options)}".rstrip())
    from axolotl.cli.main import cli

    cli.main(["train", str(resolved), *options], standalone_mode=False)


@main.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default=Path("ba_lora.yml"))
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def init(path: Path, force: bool) -> None:
    """Write a commented starter YAML with the recommended setting to PATH, and its schema for editors beside it."""
    beside = path.with_suffix(".schema.json")
    for each in (path, beside):
        _check_free(each, force=force)
    _write(path, starter(str(path), beside.name), force=force)
    _write(beside, schema_text() + "\n", force=force)
    click.echo(f"wrote {path} (and {beside} for editors); next: axolotl train {path}")


@main.command("migrate")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="CONFIG with .ba_lora before its end.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def migrate_command(config: Path, output: Path | None, force: bool) -> None:
    """Write a LoRA or QLoRA YAML for BA-LoRA, comments kept, and say key by key what was changed and why.

    The exit code is 1 where a line is left that would not train, or would train something else.
    """
    try:
        found = migrate(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise click.ClickException(f"{config}: {error}") from None
    target = output or config.with_name(f"{config.stem}.ba_lora{config.suffix}")
    _write(target, found.text, force=force)
    click.echo(f"wrote {target}")
    for change in found.changes:
        click.echo(f"  {change}")
    for finding in found.left:
        click.echo(f"  left to you: {finding}")
    click.echo(f"next: balora doctor --config {target}; axolotl train {target}")
    if found.left:
        click.get_current_context().exit(1)


@main.command("schema")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option("--force", is_flag=True, help="Overwrite a file that is no such schema.")
def schema_command(path: Path | None, force: bool) -> None:
    """Write the JSON schema of a YAML with a ba_lora: block to PATH, for editors; without PATH print it."""
    if path is None:
        click.echo(schema_text())
    else:
        _write(path, schema_text() + "\n", force=force)
        click.echo(f"wrote {path}")


def _write(path: Path, text: str, *, force: bool) -> None:
    _check_free(path, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, text)


def _check_free(path: Path, *, force: bool) -> None:
    """Refuses to overwrite what a user may have written; a schema of this or another release is nobody's work."""
    if path.exists() and not force and not _is_schema(path):
        raise click.ClickException(f"{path} exists: name another file, or pass --force.")


def _is_schema(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "ba_lora" in (found.get("properties") or {})


def write_resolved(config: Path) -> Path:
    """CONFIG with the plugins line, written as `ba_lora_config.yml` into its output directory."""
    values = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise click.ClickException(f"{config} is no YAML mapping of keys to values.")
    plugins = list(values.get("plugins") or [])
    values["plugins"] = plugins if PLUGIN in plugins else [*plugins, PLUGIN]
    output = Path(values.get("output_dir") or "./model-out")
    output.mkdir(parents=True, exist_ok=True)
    resolved = output / "ba_lora_config.yml"
    resolved.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return resolved
