"""Whether transformers' static cache serves a model in a captured step, and the proof of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from awq.generate.plan import NotFusable
from awq.generate.read.masks import check_cache, read_masks
from awq.generate.read.passes import PIECE
from awq.generate.run.no_cache import WholeDecoder
from awq.generate.run.own_cache import OwnCacheDecoder
from awq.generate.run.static import StaticDecoder, static_cache
from awq.nn.block_calls import no_cache, takes_a_cache
from awq.nn.capture import no_waiting
from awq.nn.copies import copy_structure

_PROBE = 9  # tokens of the longest prompt of the proof
_SHORT = 2  # of the longest of its second prompts
_TOLERANCE = 1e-4  # of the logits' norm
_ROUGH = 0.03  # in 16 bits


def why_not_static(model: Any) -> str | None:
    """Why transformers' static cache cannot serve this model in a captured step, or None."""
    try:
        layers = static_cache(model.config, _PROBE).layers
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        return f"transformers has no static cache for it: {error}"

    counters = [vars(layer).get("cumulative_length") for layer in layers]
    if not all(count is None or isinstance(count, Tensor) for count in counters):
        return "this transformers counts the tokens of a static cache on the host"
    if all(count is None for count in counters):
        return "its cache counts no tokens"
    return None


def _why_not_captured(model: Any) -> str | None:
    """Why no captured step can serve this model, or None."""
    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is not config:
        return "it reads more than one sequence of tokens"
    if len({t.device for t in (*model.parameters(), *model.buffers())}) != 1:
        return "the model is spread over several devices"
    return None


@torch.inference_mode()
def build_static(model: Any, max_seq_len: int) -> StaticDecoder:
    """Proven on random tokens, a step through its graph included. Raises NotFusable with the
    reason.

    The caller holds the model's lock (`awq.nn.locks`): the decoder has one cache.
    """
    reason = _why_not_captured(model)
    if reason is not None:
        raise NotFusable(reason)

    known = getattr(model.config, "max_position_embeddings", None)
    if isinstance(known, int) and known > 0:
        max_seq_len = min(max_seq_len, known)
    if max_seq_len < _PROBE + 2:
        raise NotFusable(f"max_seq_len={max_seq_len} is too short to prove it")

    first = None
    for make in _ways(model, max_seq_len):
        try:
            return _proven(make())
        except NotFusable as failure:
            first = first or failure
    assert first is not None
    raise first


def _ways(model: Any, max_seq_len: int) -> Iterator[Callable[[], StaticDecoder]]:
    """What may serve it: the first that is proven does."""
    if not takes_a_cache(model.forward):
        yield lambda: WholeDecoder(model, max_seq_len, whole_mask=False)
        return

    reason = why_not_static(model)
    if reason is None:
        _check_windows(model, max_seq_len)
        yield lambda: StaticDecoder(model, max_seq_len)
        yield lambda: StaticDecoder(model, max_seq_len, whole_mask=False)
    yield lambda: OwnCacheDecoder(model, max_seq_len)
    if reason is not None:
        raise NotFusable(reason)


def _check_windows(model: Any, max_seq_len: int) -> None:
    """Raises NotFusable unless the mask knows every window that only the cache would keep here."""
    layers = StaticCache(model.config, max_seq_len).layers
    narrow = [
        block
        for block, layer in enumerate(layers)
        if getattr(layer, "is_sliding", False) and layer.get_max_length() < max_seq_len
    ]
    if not narrow:
        return

    ids = _random_ids(model, 1, PIECE)
    masks = read_masks(copy_structure(model), ids, max_seq_len)
    if not all(block in masks for block in narrow):
        raise NotFusable("a sliding window moves the cache, and no mask shows it")
    check_cache(model, masks, max_seq_len)


def _random_ids(model: Any, rows: int, tokens: int) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    first = min(3, vocabulary - 1)
    ids = torch.randint(first, vocabulary, (rows, tokens), generator=generator)
    return ids.to(model.device)


def _proven(decoder: StaticDecoder) -> StaticDecoder:
    """The decoder itself. Raises NotFusable where it differs from the model's own forward."""
    try:
        error = _error(decoder)
    except NotFusable:
        raise
    # someone else's forward, which may fail in any way, and more so while it is captured
    except Exception as failure:
        raise NotFusable(
            f"the step cannot run over a static cache: {type(failure).__name__}: {failure}"
        ) from failure
    finally:
        decoder.restore()

    if not error <= (_ROUGH if decoder.dtype.itemsize < 4 else _TOLERANCE):
        raise NotFusable(f"over a static cache the logits differ by {error:.1e}")
    return decoder


def _error(decoder: StaticDecoder) -> float:
    """The largest relative difference to the model's plain forward, row by row: two prompts and two
    steps each, then shorter ones in the same places."""
    ids = _random_ids(decoder.model, 2, _PROBE + 2)
    first = _error_on(decoder, ids, [_PROBE, _PROBE - 4])
    second = _error_on(decoder, ids[:, -_SHORT - 2 :], [1, _SHORT])
    return float(torch.tensor([first, second]).max())  # NaN where one is


def _error_on(decoder: StaticDecoder, ids: Tensor, lengths: list[int]) -> float:
    """ids [rows, tokens of the longest prompt, and two more]."""
    longest = max(lengths)
    found = [decoder.prefill(ids[:, :-2], lengths)]
    counts = torch.tensor(lengths, dtype=torch.int32, device=ids.device)
    _look_for_waits(decoder, ids[:, -2], counts, longest)

    for step in range(2):
        logits = decoder.step(ids[:, step - 2], counts + step, longest + step)
        found.append(logits.clone())

    expected = _of_transformers(decoder, ids, counts)
    sizes = expected.norm(dim=-1).clamp(min=1e-30)
    difference = torch.stack(found, 1) - expected

    return float((difference.norm(dim=-1) / sizes).max())


def _of_transformers(decoder: StaticDecoder, ids: Tensor, lengths: Tensor) -> Tensor:
    """The logits [rows, 3, vocabulary] of the last prompt token and of two more, as the model's
    plain forward gives them for rows that are padded on the left.

    ids: [rows, tokens], the prompt's first, the two others last. lengths: [rows] of prompts.
    """
    columns = torch.arange(ids.shape[1], device=ids.device)
    tokens = ids.shape[1] - 2
    padding = tokens - lengths.unsqueeze(1).long()
    places = columns - padding  # negative in the padding
    positions = places.clamp(min=0)
    prompts = decoder.pushed(ids[:, :tokens], padding, tokens)
    whole = torch.cat([prompts, ids[:, tokens:]], 1)
    given: dict[str, Any] = dict(no_cache(decoder.model))
    if decoder.takes_positions:
        given["position_ids"] = positions
    mask = (places >= 0).long()
    out = decoder.model(input_ids=whole, attention_mask=mask, **given)

    return out.logits[:, -3:].float()


def _look_for_waits(
    decoder: StaticDecoder,
    ids: Tensor,
    lengths: Tensor,
    longest: int,
) -> None:
    """Raises RuntimeError when the step asks the GPU for a number, before a capture fails of it,
    which leaves torch in disorder."""
    if decoder.device.type != "cuda":
        return

    kept = [state.clone() for state in decoder.states()]
    decoder.eager_step(ids, lengths, longest)  # the first run may wait for what it compiles
    with no_waiting():
        decoder.eager_step(ids, lengths, longest)

    for state, value in zip(decoder.states(), kept, strict=True):
        state.copy_(value)
