"""The Python interpreter of a process that serves an engine: its steps wait for as little else as can be."""

import gc
import sys
from typing import Final

_SWITCH_SECONDS: Final = 5e-4


def favour_steps() -> None:
    """Call once in such a process, when its engine is built.

    A thread that reads an adapter hands over Python's lock within half a millisecond (5 by default), which is what a
    step that is done on the device may wait for it. What is there by now stays, and is not looked through for garbage
    any more: the libraries and the base brought most of it along.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
