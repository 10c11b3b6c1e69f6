"""The verifier: does what ships compute what was trained?

The package can be called: `edkm_export.verify(out, ...)` is the function `verify` of `edkm_export.api.verifying`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edkm_export.verify.report import Report


class _CallablePackage(ModuleType):
    """Python binds a package to its name in the parent; as a function of the same name it would hide the package."""

    def __call__(self, *arguments: Any, **options: Any) -> Report:
        """Verify an export; see `edkm_export.api.verifying.verify`."""
        # by name: this package knows nothing of what is above it
        found: Report = importlib.import_module("edkm_export.api.verifying").verify(*arguments, **options)
        return found


sys.modules[__name__].__class__ = _CallablePackage
