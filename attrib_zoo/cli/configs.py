"""Option files, checked before they are parsed: plain values only, and not too many."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from attrib_zoo.errors import DataError, reason

_LARGEST = 2**20  # bytes
_DEEPEST = 20
_FORM = "it must be a YAML file of option: value lines, such as 'model: resnet50'"


def check_configs(arguments: Sequence[str]) -> None:
    """Raise unless each ``--config`` file is small and holds plain values only.

    A few lines whose anchors refer to each other can stand for more values than memory holds, and the YAML parser would
    create them all.

    Raises:
        DataError: it is not a file, is too large, uses anchors, or is nested too deeply; the message says what it must
            be.
    """
    for name in _named(arguments):
        path = Path(name)
        try:
            if not path.exists():
                text = name  # YAML text may be given instead of a file
            elif not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > _LARGEST:
                raise DataError(f"config: '{name}' must be a file of at most {_LARGEST // 2**20} MB; {_FORM}")
            else:
                text = path.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"config: cannot read '{name}' ({reason(error)}); {_FORM}") from error
        _check(name, text)


def _named(arguments: Sequence[str]) -> Iterator[str]:
    for place, word in enumerate(arguments):
        if word == "--config" and place + 1 < len(arguments):
            yield arguments[place + 1]
        elif word.startswith("--config="):
            yield word.partition("=")[2]


def _check(name: str, text: str) -> None:
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise DataError(f"config: '{name}' must not use anchors and aliases (& and *); write the values out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise DataError(f"config: '{name}' is nested more than {_DEEPEST} deep; {_FORM}")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"config: cannot read '{name}' ({reason(error)}); {_FORM}") from error
