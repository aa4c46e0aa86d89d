"""Interrupts at lines of the package that run, as the user's Ctrl-C may: the n-th of all, or at one of a function."""

import random
import sys
from collections import Counter
from pathlib import Path
from types import CodeType
from typing import Any

import esper_elastic

PACKAGE = str(Path(esper_elastic.__file__).parent)


class Lines:
    """Counts the lines that run in chosen files, and raises KeyboardInterrupt at the nth, if there is one.

    Args:
        nth: from 1 on; 0 counts alone.
        persistent: raise at every later line as well.
        files: beginnings of paths.

    Attributes:
        count: of lines.
    """

    def __init__(self, nth: int = 0, *, persistent: bool = False, files: tuple[str, ...] = (PACKAGE,)) -> None:
        self.count, self.nth, self.persistent, self.files = 0, nth, persistent, files

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        if event == "line":
            self.count += 1
            if self.nth and (self.count == self.nth or (self.persistent and self.count > self.nth)):
                self.interrupt()
        return self

    @property
    def raised(self) -> bool:
        return bool(self.nth) and self.count >= self.nth

    def interrupt(self) -> None:
        if self.persistent:
            sys.setprofile(self._trace_again)
        raise KeyboardInterrupt

    def _trace_again(self, frame: Any, event: str, argument: Any) -> None:
        """Python stops tracing where a trace function raises: at the next call or return it begins again."""
        if self.raised and sys.gettrace() is None:
            sys.settrace(self)
            self._trace_all(frame)

    def _trace_all(self, frame: Any) -> None:
        """Have the lines of a frame and of those that called it traced."""
        while frame is not None:
            if frame.f_code.co_filename.startswith(self.files):
                frame.f_trace = self
            frame = frame.f_back

    def __enter__(self) -> "Lines":
        sys.settrace(self)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)
        sys.settrace(None)


class Functions:
    """Counts how often each function of the package is called, which is quick.

    Attributes:
        calls: of each.
    """

    def __init__(self) -> None:
        self.calls: Counter[CodeType] = Counter()

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            self.calls[frame.f_code] += 1

    def draw(self, generator: random.Random) -> tuple[CodeType, int, int]:
        """A place for :class:`At`: any function, one of its calls, one of its first lines."""
        function = generator.choice(list(self.calls))
        call = min(generator.randint(1, self.calls[function]) for _ in range(2))
        return function, call, generator.randint(1, 6)

    def __enter__(self) -> "Functions":
        sys.settrace(self)
        return self

    def __exit__(self, *error: Any) -> None:
        sys.settrace(None)


class At(Lines):
    """Raises KeyboardInterrupt at the nth line that runs in one call of a function, or, where it has fewer, at the next of the package.

    Args:
        function: its code.
        call: which of its calls, from 1 on.
        line: from 1 on.
        persistent: raise at every later line of the package as well.
    """

    def __init__(self, function: CodeType, call: int, line: int, *, persistent: bool = False) -> None:
        super().__init__(line, persistent=persistent)
        self.function, self.calls_left, self.over = function, call, False

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        if self.over:
            return super().__call__(frame, event, argument)
        if frame.f_code is self.function and event == "call":
            self.calls_left -= 1
            return self._inside if self.calls_left == 0 else None
        return None

    def _inside(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line" and self.count + 1 == self.nth:
            self.over = True
            return super().__call__(frame, event, argument)
        if event == "line":
            self.count += 1
        elif event == "return":
            self.over, self.nth = True, self.count + 1
            self._trace_all(frame.f_back)
        return self._inside
