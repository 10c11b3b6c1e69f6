"""What a command of the command line did."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Result"]


@dataclass(frozen=True)
class Result:
    """Exit status and what was printed."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The one line in which a mistake is explained; there is no traceback and nothing after it."""
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if line.startswith("edkm-export: ")]
        assert len(lines) == 1 and self.err.endswith(f"{lines[0]}\n"), self.err
        return lines[0].removeprefix("edkm-export: ")
