"""Packages that only an optional extra installs."""

from __future__ import annotations

import importlib
from typing import Any


class MissingModuleError(ImportError):
    """A package of an optional extra is not installed."""


def optional_module(name: str, extra: str = "translation") -> Any:
    """Return the module `name` (dotted names allowed). If it is missing, MissingModuleError names the pip extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingModuleError(
            f"{package} cannot be imported ({error}); install it with: pip install 'fused-attention[{extra}]'"
        ) from error
