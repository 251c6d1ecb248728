"""Batches of few tokens as CUDA graphs: on a GPU most of their time is the host's, starting a
hundred kernels one by one.

A graph serves one shape: texts up to a power of two, tokens up to a multiple of 16. It is made when
its shape comes for the
second time and proven then: it must give what the plain forward gives. Where that fails, or the
model asks for numbers from the GPU on its way, everything goes through the plain forward.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.nn.capture import NothingFromTheHost, capture, no_waiting, on_stream
from awq.nn.linear import WQLinear, layouts_stay
from awq.nn.places import Places

logger = logging.getLogger("awq.embed")

_TOKENS = 4096  # of a batch, padding included; with more, the GPU is what takes the time
# Of tokens times weights of linears: milliseconds of a GPU, no more than the host takes to start
# the kernels.
_WORK = 1e11
_STEP = 16  # tokens
_MOST = 128  # graphs, whose memory is shared but for their own kernels' arguments
_TOLERANCE, _ROUGH = 1e-3, 0.05  # of an embedding's norm; the second in 16 bits

Forward = Callable[[dict[str, Tensor], int], Tensor]


class _ByShapeAlone(NothingFromTheHost):
    """The forward as a function of its inputs' shape and values on the GPU, with nothing that a
    capture cannot hold.

    Whether a mask hides anything is a question to the GPU: the answer is yes, so that the graph
    serves masks that do. Copies from the CPU, as of a table of relative positions, depend on the
    shape alone: they are made the first time, and found after that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[Any] = []
        # of the next copy that is to be found; None: they are being made
        self.place: int | None = None

    def again(self) -> _ByShapeAlone:
        """The same, for another forward of that shape."""
        self.place = 0
        return self

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        if function is Tensor.__bool__ and args[0].is_cuda:
            return False  # not all of them are ones
        if function not in (Tensor.to, Tensor.cuda) or args[0].device.type != "cpu":
            return super().__torch_function__(function, types, args, kwargs)
        if self.place is None:
            self.copies.append(function(*args, **(kwargs or {})))
            return self.copies[-1]

        self.place += 1
        return self.copies[self.place - 1]


class Graph:
    """One captured shape. Inputs are copied into its own tensor, its result is overwritten by the
    next replay of any."""

    def __init__(
        self,
        forward: Forward,
        inputs: dict[str, Tensor],
        prompt_tokens: int,
        stream: Any,
        pool: Any,
    ) -> None:
        """inputs: int64 [texts, tokens] each, on the CPU. stream: to make it on, the same one
        always: for each stream that a product has run on, torch keeps tens of megabytes of work
        space."""
        self.names = list(inputs)
        self.block = torch.stack(list(inputs.values())).to(stream.device)
        static = dict(zip(self.names, self.block))
        mode = _ByShapeAlone()

        with on_stream(stream):
            with mode:
                # what has to be compiled or allocated is so before the capture
                forward(static, prompt_tokens)
            with mode.again(), no_waiting():
                forward(static, prompt_tokens)

        with mode.again():
            self.graph, self.result = capture(lambda: forward(static, prompt_tokens), stream, pool)
        self.copies = mode.copies  # the graph reads them
        self.pool = self.graph.pool()

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        self.block.copy_(torch.stack([inputs[name] for name in self.names]))
        self.graph.replay()
        return self.result


class EncoderGraphs:
    """`Encoder.forward` on a GPU, through graphs where it pays. Calls from several threads take
    turns."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.lock = Lock()
        self._forget(None)

    def __getstate__(self) -> dict[str, Any]:
        return {"encoder": self.encoder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["encoder"])  # type: ignore[misc]

    def _forget(self, places: Places | None) -> None:
        self.places = places
        self.most_tokens = 0.0  # of a batch that may have a graph
        self.reason: str | None = None  # why there are no graphs
        self.seen: set[tuple] = set()
        self.graphs: dict[tuple, Graph] = {}
        self.pool: Any = None
        self.stream: Any = None

    def look(self) -> None:
        """Forgets all graphs when a weight is no longer where it was: they would go on with the old
        ones."""
        if self.places is None or not self.places.are_of(self.encoder):
            with self.lock, layouts_stay():
                self._forget(Places(self.encoder))
                linears = (
                    m for m in self.encoder.modules() if isinstance(m, (nn.Linear, WQLinear))
                )
                self.most_tokens = min(
                    _TOKENS, _WORK / max(1, sum(m.in_features * m.out_features for m in linears))
                )

    def __call__(self, inputs: dict[str, Tensor], prompt_tokens: int = 0) -> Tensor:
        """inputs: int64 [texts, tokens] by name, on the CPU. Embeddings [texts, features] on the
        GPU."""
        texts, tokens = inputs["input_ids"].shape
        rows = 1 << (texts - 1).bit_length()
        length = max(tokens, min(-(-tokens // _STEP) * _STEP, self.encoder.max_seq_length))
        too_much = rows * length > self.most_tokens
        if (
            self.reason is not None
            or too_much
            or self.encoder.model.training
            or torch.is_autocast_enabled()
        ):
            return self.encoder(inputs, prompt_tokens)

        key = (rows, length, prompt_tokens, *inputs)
        # Tensors made in inference mode could not be written to by calls outside of it.
        with (
            self.lock,
            torch.cuda.device(self.encoder.device),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            graph = self.graphs.get(key)
            if graph is not None:
                return graph(self._enlarged(inputs, rows, length))[:texts].clone()

            expected = self.encoder(inputs, prompt_tokens)
            if key in self.seen and len(self.graphs) < _MOST:
                self._capture(key, self._enlarged(inputs, rows, length), prompt_tokens, expected)
            self.seen.add(key)

            return expected

    def _capture(
        self,
        key: tuple,
        inputs: dict[str, Tensor],
        prompt_tokens: int,
        expected: Tensor,
    ) -> None:
        try:
            self.stream = self.stream or torch.cuda.Stream(expected.device)
            with layouts_stay():
                graph = Graph(self.encoder, inputs, prompt_tokens, self.stream, self.pool)
            error = _difference(graph(inputs)[: len(expected)], expected)
            padded = self._padded(inputs)
            errors = error, _difference(graph(padded), self.encoder(padded, prompt_tokens))
        # someone else's forward, which may fail in any way while it is captured
        except Exception as failure:
            self.reason = f"{type(failure).__name__}: {failure}"
        else:
            rough = next(self.encoder.model.parameters()).dtype.itemsize < 4
            if all(error <= (_ROUGH if rough else _TOLERANCE) for error in errors):
                self.graphs[key], self.pool = graph, graph.pool
                return
            self.reason = f"its results differ by {max(errors):.1e}"

        self.graphs.clear()
        logger.warning("the encoder runs without CUDA graphs: %s", self.reason)

    def _enlarged(self, inputs: dict[str, Tensor], rows: int, length: int) -> dict[str, Tensor]:
        """With hidden padding to `length` tokens and, as copies of the last text, to `rows`
        texts."""
        texts, tokens = inputs["input_ids"].shape
        row = torch.arange(rows).clamp(max=texts - 1)
        fill = self.encoder.padding

        return {
            name: F.pad(value[row], (0, length - tokens), value=fill.get(name, 0))
            for name, value in inputs.items()
        }

    def _padded(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with the last quarter of the first text hidden: a graph made where nothing is
        hidden must know of masks too."""
        found = {name: value.clone() for name, value in inputs.items()}
        for name, value in found.items():
            value[0, -(value.shape[1] // 4) or value.shape[1] :] = self.encoder.padding.get(name, 0)
        return found


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest ‖found − expected‖ / ‖expected‖ of any text; NaN where one is."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)).max())
