"""Where in the code of a module its calls stand, so that another path through the code does not mix them up.

Calls are named by their kind and number, in the order of the run that lq looked at: ``matmul_0``, ``matmul_1``. In a
run that takes another branch, or goes round a loop more often, the same number may be another call. So a call is told
by its place: the functions between the module's forward and the call, and where in each of them. What stands nowhere
that is known has no name, and no quantizer. Numbers count where places cannot be seen (in compiled code), and the two
ways to compute attention, fused or by two products, stand for each other.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from types import FrameType

# Functions of `lq.attachment.running` that call a module's forward, or a part of it.
_ENTRIES = {"quantized_forward", "recomputed_part"}

#: Ends a place where attention is computed by one function instead of two products.
FUSED = " fused"


def place_in_code(prefix: str = "") -> str:
    """The functions between a module's forward and the code that calls lq, without torch's, and where in each of them.

    Args:
        prefix: the place that the outermost of them was called from, if that was not the forward.
    """
    parts = [f"{frame.f_code.co_name}@{frame.f_lasti}" for frame in _frames_of_forward()]
    return "<".join([*parts, prefix] if prefix else parts)


def line_in_code() -> str:
    """Function and line of the code that calls lq, for messages."""
    frame = next(iter(_frames_of_forward()), None)
    return "its forward" if frame is None else f"{frame.f_code.co_name} (line {frame.f_lineno} of its file)"


def _frames_of_forward() -> Iterable[FrameType]:
    """Frames of the functions that run, innermost first, up to the forward of a module."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module == "torch.nn.modules.module" or (module == "lq.attachment.running" and function in _ENTRIES):
            return
        of_torch = module.startswith("torch.") and not module.startswith("torch.nn.modules.")
        if not (of_torch or module.startswith("lq.") or function == "__torch_function__"):
            yield frame
        frame = frame.f_back


class Places:
    """The places of a module's calls."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[str, str], list[int]] = {}  # by kind and place, in the order of a run
        #: Instructions that other places than the known ones lead to, beside the known ones.
        self.ambiguous: set[tuple[str, str]] = set()

    def add_run(self, calls: Iterable[tuple[str, int, str]]) -> None:
        """Add the calls of a run: kind, number and place of each."""
        found: dict[tuple[str, str], list[int]] = {}
        for kind, number, place in calls:
            found.setdefault((kind, place), []).append(number)
        for key, numbers in found.items():
            if len(numbers) > len(self.numbers.get(key, ())):
                self.numbers[key] = numbers

    def unused(self, kind: str, chosen: Callable[[str], bool], used: set[tuple[str, int]]) -> list[int]:
        """Numbers of calls of a kind at the places that are `chosen`, without those that are `used`."""
        found = {n for (of, place), numbers in self.numbers.items() if of == kind and chosen(place) for n in numbers}
        return sorted(number for number in found if (kind, number) not in used)


class CallOrder:
    """Numbers the calls of one run.

    Args:
        places: where calls stand; None: not known, they are numbered as they come.
    """

    def __init__(self, places: Places | None) -> None:
        self._places = places
        self._counts: dict[str, int] = {}
        self._visits: Counter[tuple[str, str]] = Counter()
        self._used: set[tuple[str, int]] = set()
        self.calls: list[tuple[str, int, str]] = []

    def copy(self) -> "CallOrder":
        """Goes on from here by itself."""
        copied = CallOrder(self._places)
        copied._counts, copied._visits = dict(self._counts), self._visits.copy()
        copied._used, copied.calls = set(self._used), list(self.calls)
        return copied

    def by_count(self, kind: str, calls: int = 1) -> int:
        """The next number of a kind."""
        number = self._counts.get(kind, 0)
        self._counts[kind] = number + calls
        return number

    def next(self, kind: str, place: str, calls: int = 1) -> int | None:
        """The number of the call at a place, or of the first of several that one function stands for; None: unknown."""
        key = kind, place + (FUSED if calls > 1 else "")
        if self._places is None:
            number = self.by_count(kind, calls)
            self.calls += [(kind, number + i, key[1]) for i in range(calls)]
            return number
        known = self._places.numbers.get(key)
        if known is None:
            found = self._elsewhere(kind, key[1], calls)
        else:
            found = known[self._visits[key] * calls :][:calls]
            self._visits[key] += 1
            if any((kind, number) in self._used for number in found):  # by what was taken for the same, and is not
                self._places.ambiguous.add((kind, _instruction(place)))
        if len(found) < calls:
            return None
        self._used.update((kind, number) for number in found)
        return found[0]

    def _elsewhere(self, kind: str, place: str, calls: int) -> list[int]:
        """Numbers of calls that have not run, and are this one in another place.

        The same instruction may be reached another way, such as through checkpointing; and attention may be computed
        by one function or by two products.
        """
        if self._places is None:
            return []
        here = _instruction(place)
        if (kind, here) in self._places.ambiguous:
            return []
        same = self._places.unused(kind, lambda other: _instruction(other) == here, self._used)
        if not same and kind == "matmul":
            same = self._places.unused(kind, lambda other: other.endswith(FUSED) != (calls > 1), self._used)
        return same[:calls]


def _instruction(place: str) -> str:
    """The innermost function of a place, and where in it."""
    return place.removesuffix(FUSED).partition("<")[0]


def call_of(slot: str) -> str:
    """The call that an operand belongs to.

    >>> call_of("matmul_0_left"), call_of("conv_transpose2d_1_weight")
    ('matmul_0', 'conv_transpose2d_1')
    """
    words = slot.split("_")
    end = next(i for i, word in enumerate(words) if word.isdigit())
    return "_".join(words[: end + 1])
