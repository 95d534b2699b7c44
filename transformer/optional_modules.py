"""Imports of the packages in the optional extra `translation`, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any


class MissingModuleError(ImportError):
    """A package of the optional extra `translation` is not installed."""


def optional_module(name: str) -> Any:
    """Return the module `name` (dotted names allowed); MissingModuleError names the pip extra when it is absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingModuleError(
            f"{package} cannot be imported ({error}); install it with: pip install 'fused-attention[translation]'"
        ) from error
