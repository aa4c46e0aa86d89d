"""Interrupts at the n-th line of the package that runs, as the user's Ctrl-C may."""

import sys
from pathlib import Path
from typing import Any

import esper_elastic

PACKAGE = str(Path(esper_elastic.__file__).parent)


class Lines:
    """Counts the lines that run in chosen files, and raises KeyboardInterrupt at the nth, if there is one.

    Args:
        nth: from 1 on; 0 counts alone.
        persistent: raise at every later line as well.
        files: beginnings of paths.
    """

    def __init__(self, nth: int = 0, *, persistent: bool = False, files: tuple[str, ...] = (PACKAGE,)) -> None:
        self.count, self.nth, self.persistent, self.files = 0, nth, persistent, files

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        if event == "line":
            self.count += 1
            if self.nth and (self.count == self.nth or (self.persistent and self.count > self.nth)):
                raise KeyboardInterrupt
        return self

    def _trace_again(self, frame: Any, event: str, argument: Any) -> None:
        """Python stops tracing where a trace function raises: at the next call or return it begins again."""
        if self.nth and self.count >= self.nth and sys.gettrace() is None:
            sys.settrace(self)
            while frame is not None:
                if frame.f_code.co_filename.startswith(self.files):
                    frame.f_trace = self
                frame = frame.f_back

    def __enter__(self) -> "Lines":
        if self.persistent:
            sys.setprofile(self._trace_again)
        sys.settrace(self)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)
        sys.settrace(None)
