"""One lock for each model, shared by everybody who builds on it or takes it apart.

Serving calls a model from many threads. Whoever fuses it, proves it, captures its step or uses the
one cache that it has must take turns, and two wrappers around the same model must take the same
turns. So the lock belongs to the model, not to a wrapper. It is kept beside the model rather than
inside it, because a lock can be neither copied nor pickled and models must be both.

Nobody needs the lock to read a model: a plain forward, a copy and a save run without it. What makes
that safe is a rule for
the builders: a live model changes only by replacing one module with another of equal values, one at
a time.
"""

from __future__ import annotations

from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_making = Lock()


def lock_of(owner: Any) -> Any:
    """The reentrant lock that belongs to a model (or a tokenizer, a loader): always the same one,
    as long as the owner lives.

    >>> lock_of(model) is lock_of(model)
    True
    """
    with _making:
        found = _locks.get(owner)
        if found is None:
            found = _locks[owner] = RLock()
        return found
