"""Lets Triton 3.6's interpreter take loop bounds that were loaded: numpy 2.4 no longer makes an int of an array of one element."""

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_too(tensor, scope):
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_too
