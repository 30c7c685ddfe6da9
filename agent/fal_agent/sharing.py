"""Keep what is one object in the notebook one object in a session, and the other way round.

Runs in the notebook and in workers. Both sides number the objects that names have in common, in
the order in which they first travelled. A name that travels again says of each object only what
changed, and that is put into the very object which the other side has: so another name, or another
object, that refers to it sees the change, as it would in one process. Both sides do the same steps
in the same order, and count them; where the counts differ, they begin anew. Objects are kept alive by
nobody here, where Python can refer to them weakly: `del` frees them at once.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import weakref
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any, Optional

from fal_agent.namespaces import opening_in, pickler_in
from fal_agent.objects import KINDS, WHOLE, Kind, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fal_agent.framing import Buffer

__all__ = ["SHARED_LIMIT", "SharedObjects"]

SHARED_LIMIT = 1 << 20  # bytes of a value that is taken apart; a larger one travels as it is

_PROTOCOL = 5
_FEW = 1000


class SharedObjects:
    """The objects that this side has in common with the other.

    Args:
        namespace: of this side.
        sign: 1 in the notebook, -1 in a session: of the numbers that this side gives.

    Attributes:
        steps: values that were encoded or decoded.
    """

    def __init__(self, namespace: dict[str, Any], sign: int) -> None:
        self.namespace = namespace
        self.steps = 0
        self._sign, self._count = sign, 0
        self._objects: dict[int, Callable[[], Any]] = {}  # number -> gives the object, while it lives
        self._numbers: dict[int, int] = {}  # id -> number, of objects that live
        self._kinds: dict[int, Kind] = {}
        self._digests: dict[int, bytes] = {}  # number -> of what was in an object when both agreed
        self._uses: dict[int, int] = {}  # number -> names that lead to it
        self._names: dict[str, array[int]] = {}  # name -> numbers of what it leads to
        self._roots: dict[str, bytes] = {}  # name -> its pickle, by numbers

    def encode(self, name: str, value: Any) -> bytes:
        """Pickle the value of a name, by what the other side lacks.

        Raises:
            Exception: it cannot be pickled; nothing has changed then, and no step was made.
        """
        encoding = _Encoding(self)
        try:
            root = encoding.dump(value)
            encoding.look_at(self._names.get(name, ()))  # others may refer to what this name leaves behind
            contents = encoding.changed_contents()
        except BaseException:
            for number in encoding.introduced:
                self._forget(number)
            raise
        seen = array("q", encoding.seen)
        self._digests.update(encoding.digests)
        self._roots[name] = root
        self._keep(name, seen)
        self.steps += 1
        return pickle.dumps((encoding.shells, contents, root, seen), _PROTOCOL)

    def decode(self, name: str, data: Buffer) -> Any:
        """Open what `encode` of the other side made; gives the value of the name.

        Raises:
            Exception: it cannot be opened; both sides have to begin anew.
        """
        shells, contents, root, seen = pickle.loads(data)
        with opening_in(self.namespace):
            decoding = _Decoding(
                self, shells, dict(contents)
            )  # keeps what is made alive until it is in place
            decoding.run()
            value = self.load(root)
        self._keep(name, seen)
        self.steps += 1
        looking = _Encoding(self, is_looking=True)
        told = {*(number for number, _, _ in shells), *(number for number, _ in contents)}
        for number in told & self._objects.keys():
            self._digests[number] = looking.digest_of(number)
        self._roots[name] = looking.dump(value)
        return value

    @property
    def count(self) -> int:
        """How many numbers this side has given."""
        return self._count

    def is_newer(self, name: str, count: int) -> bool:
        """Whether all that a name leads to got its number, from this side, after the first `count`."""
        return all(self._sign * number > count for number in self._names.get(name, ()))

    def has(self, name: str) -> bool:
        """Whether both sides have the value of a name in common."""
        return name in self._roots

    def is_quick(self, name: str) -> bool:
        """Whether a name leads to so few objects that looking at each of them takes no time."""
        return len(self._names.get(name, ())) <= _FEW

    def is_current(self, name: str, value: Any) -> bool:
        """Whether a name leads to the very objects that both sides know, and nothing in them has changed.

        Raises:
            Exception: the value cannot be pickled any more.
        """
        encoding = _Encoding(self, is_looking=True)
        if encoding.dump(value) != self._roots.get(name) or encoding.has_news:
            return False
        return not encoding.changed_contents() and not encoding.has_news

    def farewells(self, names: Iterable[str]) -> dict[str, bytes]:
        """Tell, before names are forgotten, what has changed in what they lead to; to be decoded there."""
        told = {}
        for name in names:
            if name in self._names:
                encoding = _Encoding(self, is_looking=True)
                encoding.look_at(self._names[name])
                if encoding.changed_contents():
                    told[name] = self.encode(name, None)
        return told

    def forget(self, names: Iterable[str]) -> None:
        """Names do not stand any more for what they led to."""
        for name in names:
            if name in self._names:
                self._keep(name, array("q"))
                del self._names[name]
                del self._roots[name]

    # ------------------------------------------------------------ for the two classes below

    def number_of(self, value: Any) -> Optional[int]:
        """The number of an object, if it has one."""
        return self._numbers.get(id(value))

    def object_of(self, number: int) -> Any:
        """The object of a number; None if it is gone."""
        return self._objects[number]()

    def digest(self, number: int) -> Optional[bytes]:
        """Of what was in an object when both sides agreed."""
        return self._digests.get(number)

    def kind(self, number: int) -> Kind:
        """What kind of object a number stands for."""
        return self._kinds[number]

    def add(self, value: Any, kind: Kind, number: Optional[int] = None) -> int:
        """Give an object a number: the next one, or the one that the other side gave it."""
        if number is None:
            self._count += 1
            number = self._sign * self._count
        self._kinds[number] = kind
        self._numbers[id(value)] = number
        try:
            self._objects[number] = weakref.ref(value, functools.partial(self._died, id(value), number))
        except TypeError:
            self._objects[number] = lambda: value
        return number

    def load(self, data: Buffer) -> Any:
        """Unpickle something that refers to objects by their numbers."""
        return _Unpickler(data, self._objects).load()

    def _keep(self, name: str, numbers: array[int]) -> None:
        """Know what a name leads to; objects that no name leads to any more are let go."""
        before = self._names.get(name, ())
        self._names[name] = numbers
        for number in numbers:
            self._uses[number] = self._uses.get(number, 0) + 1
        for number in before:
            self._uses[number] -= 1
            if not self._uses[number]:
                self._forget(number)

    def _forget(self, number: int) -> None:
        self._uses.pop(number, None)
        self._digests.pop(number, None)
        self._kinds.pop(number, None)
        give = self._objects.pop(number, None)
        if give is not None and (value := give()) is not None:
            self._died(id(value), number)

    def _died(self, identity: int, number: int, _reference: Any = None) -> None:
        """An object has no number any more; the next one at its place is another."""
        if self._numbers.get(identity) == number:
            del self._numbers[identity]


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: Buffer, objects: dict[int, Callable[[], Any]]) -> None:
        super().__init__(io.BytesIO(data))
        self._objects = objects

    def persistent_load(self, pid: Any) -> Any:
        give = self._objects.get(pid)
        value = None if give is None else give()
        if value is None:
            raise _NotYetError(pid)
        return value


class _NotYetError(Exception):
    """An object is referred to that has not been made."""


class _Encoding:
    """Takes one value apart.

    Args:
        shared: the objects that have numbers.
        is_looking: give no numbers: this only tells what is in objects.

    Attributes:
        shells: (number, kind, pickle) of each object that the other side lacks.
        seen: numbers of all objects that the value leads to, in order.
        introduced: numbers that were given.
        digests: number -> of what is in an object, where the other side is told.
        has_news: it leads to objects that have no numbers, or to changed ones that travel as a whole.
    """

    def __init__(self, shared: SharedObjects, *, is_looking: bool = False) -> None:
        self._shared, self._is_looking = shared, is_looking
        self.shells: list[tuple[int, str, bytes]] = []
        self.seen: dict[int, None] = {}
        self.introduced: list[int] = []
        self.digests: dict[int, bytes] = {}
        self.has_news = False
        self._pending: list[tuple[int, Kind, Any]] = []
        self._kept: list[Any] = []  # what got a number, or another would get its place meanwhile

    def dump(self, value: Any) -> bytes:
        """Pickle something; what can change in it is referred to by number."""
        file = io.BytesIO()
        _numbering_pickler()(file, self._number, self._shared.namespace).dump(value)
        return file.getvalue()

    def look_at(self, numbers: Iterable[int]) -> None:
        """See what is in objects that the value need not lead to any more."""
        for number in numbers:
            if number not in self.seen:
                kind, value = self._shared.kind(number), self._shared.object_of(number)
                if kind is not WHOLE and value is not None:
                    self._pending.append((number, kind, value))

    def changed_contents(self) -> list[tuple[int, bytes]]:
        """Give (number, pickle) of what is in each object whose content is news."""
        contents = []
        while self._pending:
            number, kind, value = self._pending.pop()
            data = self.dump(kind.content(value))
            digest = _digest(data)
            if self._shared.digest(number) != digest:
                contents.append((number, data))
                self.digests[number] = digest
        return contents

    def digest_of(self, number: int) -> bytes:
        """Tell what is in an object by its digest."""
        value, kind = self._shared.object_of(number), self._shared.kind(number)
        if kind is WHOLE:
            return _digest(self._dump_whole(value))
        return _digest(self.dump(kind.content(value)))

    def _number(self, value: Any) -> Optional[int]:
        number = self._shared.number_of(value)
        if number in self.seen:
            return number
        kind = kind_of(value, self._shared.namespace) if number is None else self._shared.kind(number)
        if kind is None:
            return None
        if number is None and self._is_looking:
            self.has_news = True
            return None
        if kind is WHOLE:
            return self._number_of_whole(value, number)
        if number is None:
            number = self._introduce(value, kind)
            self.shells.append((number, type(kind).__name__, self.dump(kind.shell(value))))
        self.seen[number] = None
        self._pending.append((number, kind, value))
        return number

    def _number_of_whole(self, value: Any, number: Optional[int]) -> int:
        """What travels as a whole gets another number when it has changed."""
        data = self._dump_whole(value)
        digest = _digest(data)
        self.has_news = self.has_news or number is None or self._shared.digest(number) != digest
        if number is None or (
            self.has_news and not self._is_looking and self._shared.digest(number) != digest
        ):
            number = self._introduce(value, WHOLE)
            self.shells.append((number, "", data))
            self.digests[number] = digest
        self.seen[number] = None
        return number

    def _introduce(self, value: Any, kind: Kind) -> int:
        number = self._shared.add(value, kind)
        self._kept.append(value)
        self.introduced.append(number)
        self.seen[number] = None
        return number

    def _dump_whole(self, value: Any) -> bytes:
        file = io.BytesIO()
        pickler_in()(file, None, self._shared.namespace).dump(value)
        return file.getvalue()


class _Decoding:
    """Makes the objects that came, and puts into them, and into those that are here, what is news."""

    def __init__(
        self, shared: SharedObjects, shells: list[tuple[int, str, bytes]], contents: dict[int, bytes]
    ) -> None:
        self._shared, self._contents = shared, contents
        self._made: list[Any] = []
        self._steps: deque[Callable[[], None]] = deque()
        for number, kind, data in shells:
            self._steps.append(functools.partial(self._make, number, kind, data))

    def run(self) -> None:
        """Do it all.

        Raises:
            Exception: something cannot be opened, or refuses its content.
        """
        self._work()
        ranked = sorted((self._rank(number), number) for number in self._contents)
        self._steps.extend(functools.partial(self._fill, number) for _, number in ranked)
        self._work()

    def _work(self) -> None:
        """Take each step when it can be taken: some wait for others, which may come after them."""
        refused = 0
        while self._steps:
            step = self._steps.popleft()
            try:
                step()
                refused = 0
            except Exception:
                self._steps.append(step)
                refused += 1
                if refused == len(self._steps):
                    raise

    def _make(self, number: int, kind: str, data: bytes) -> None:
        if not kind:
            self._made.append(pickle.loads(data))
            self._shared.add(self._made[-1], WHOLE, number)
            return
        value = KINDS[kind].make(self._shared.load(data) if data else None)
        self._made.append(value)
        self._shared.add(value, KINDS[kind], number)
        if KINDS[kind].is_early and number in self._contents:
            self._steps.append(functools.partial(self._fill, number))

    def _rank(self, number: int) -> int:
        return self._shared.kind(number).rank(self._shared.object_of(number))

    def _fill(self, number: int) -> None:
        data = self._contents.get(number)
        if data is None:  # done before
            return
        self._shared.kind(number).fill(self._shared.object_of(number), self._shared.load(data))
        del self._contents[number]


@functools.cache
def _numbering_pickler() -> Callable[..., Any]:
    """Make the pickler's class, once; its base is imported on first use."""
    base: Any = pickler_in()

    class NumberingPickler(base):  # type: ignore[misc] # cloudpickle has no types
        """Refers to objects by numbers."""

        def __init__(
            self, file: Any, number: Callable[[Any], Optional[int]], namespace: dict[str, Any]
        ) -> None:
            self._number = number
            super().__init__(file, None, namespace)

        def persistent_id(self, obj: Any) -> Optional[int]:
            return self._number(obj)

    return NumberingPickler


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
