"""The library's own code on the page, so that no notebook copies it."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Any


def show_source(f: Callable[..., Any]) -> None:
    """Display the source of a function or method, as it runs here, in colour."""
    from IPython.display import Code, display

    display(Code(textwrap.dedent(inspect.getsource(f)).rstrip(), language="python"))
