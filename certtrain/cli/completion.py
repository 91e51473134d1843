"""Completion in the shell, by argcomplete: commands, options, files, names of configs, keys and their values."""

from __future__ import annotations

import argparse
import os
from typing import Any

SHELLS = ("bash", "zsh", "fish")


def script(shell: str) -> str:
    """What `shell` has to read so that it completes `certtrain`."""
    import argcomplete

    return argcomplete.shellcode(["certtrain"], shell=shell)


def answer(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that asks what can follow, and leave; where none asks, do nothing."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser, always_complete_options=False)


def configs(prefix: str, **context: Any) -> list[str]:
    """Names of shipped configs, and YAML files."""
    from certtrain.config.loading import runnable_configs

    return [*runnable_configs(), *_yaml_files(prefix)]


def studies(prefix: str, **context: Any) -> list[str]:
    """Names of shipped studies, and YAML files."""
    from certtrain.config.loading import shipped_studies

    return [*shipped_studies(), *_yaml_files(prefix)]


def _yaml_files(prefix: str) -> list[str]:
    from argcomplete.completers import FilesCompleter

    return list(FilesCompleter(("yaml", "yml"))(prefix))


def overrides(prefix: str, **context: Any) -> list[str]:
    """`section.key=`, and behind it the values that there are."""
    from certtrain.config.keys import choices_of, dotted_fields

    key, equals, _ = prefix.partition("=")
    if not equals:
        return [f"{name}=" for name, _ in dotted_fields()]
    return [f"{name}={value}" for name, field in dotted_fields() if name == key for value in choices_of(field)]
