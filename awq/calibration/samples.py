"""Calibration samples of more than text: images or sound beside it, or a model's inputs as they
are.

    [{"images": image, "text": "<image>A cat."}]      through the model's processor
    [{"audio": samples, "text": "its transcript"}]    the same; a decoder reads the transcript
    {"input_features": …, "decoder_input_ids": …}     a model's own inputs, as tensors

A sample of a processor is a batch of its own: how many tokens an image has depends on its size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from awq.calibration.batches import CalibrationBatch
from awq.errors import CalibrationError, first_line

MEDIA = ("images", "videos", "audio", "audios")
_IGNORED = -100  # in labels: no token


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor of images or sound; a tokenizer itself."""
    inside = getattr(processor, "tokenizer", None)
    parts = ("image_processor", "feature_extractor", "video_processor")
    has_media = any(getattr(processor, part, None) is not None for part in parts)
    return inside if inside is not None and has_media else processor


def media_samples(data: Any) -> list[Mapping[str, Any]] | None:
    """The samples of calibration data that holds more than text; None for any other data."""
    if isinstance(data, Mapping):
        return [data] if _is_media(data) else None
    if isinstance(data, (list, tuple)) and data and all(isinstance(item, Mapping) for item in data):
        return list(data) if any(_is_media(item) for item in data) else None
    return None


def _is_media(sample: Mapping[str, Any]) -> bool:
    if any(name in sample for name in MEDIA):
        return True
    return any(isinstance(v, Tensor) and v.is_floating_point() for v in sample.values())


def media_batches(
    samples: Iterable[Mapping[str, Any]],
    processor: Any,
    accepted: Collection[str],
    start_token: int,
) -> list[CalibrationBatch]:
    """One batch for each sample.

    processor: None when all samples are inputs of the model. accepted: arguments of its forward.
    start_token: what a decoder begins with, before labels. Raises CalibrationError for what the
    processor or the model does not take.
    """
    return [
        _batch(_processed(sample, processor), accepted, start_token, place)
        for place, sample in enumerate(samples)
    ]


def _processed(sample: Mapping[str, Any], processor: Any) -> dict[str, Any]:
    if not any(name in sample for name in MEDIA):
        return dict(sample)
    if processor is None or tokenizer_of(processor) is processor:
        raise CalibrationError(
            f"calibration samples with {', '.join(n for n in MEDIA if n in sample)} need the "
            "model's processor: quantize(AutoProcessor.from_pretrained(…), calib_data=samples)."
        )

    given = {name: value for name, value in sample.items() if value is not None}
    text = given.get("text")
    try:
        if isinstance(text, (list, tuple)) and text and isinstance(text[0], Mapping):  # a chat
            given["text"] = processor.apply_chat_template(list(text), tokenize=False)
        return dict(processor(**given, return_tensors="pt"))
    except Exception as error:  # of anybody's processor
        raise CalibrationError(
            f"the processor does not take a sample of {', '.join(sample)}: {first_line(error)}"
        ) from error


def _batch(
    item: dict[str, Any],
    accepted: Collection[str],
    start_token: int,
    place: int,
) -> CalibrationBatch:
    labels = item.pop("labels", None)
    tensors = {}
    for name, value in item.items():
        if isinstance(value, Tensor) and name in accepted:
            tensors[name] = value

    if "input_ids" in tensors:
        ids = tensors.pop("input_ids")
        mask = tensors.pop("attention_mask", torch.ones_like(ids))
        return CalibrationBatch(ids, mask, tensors)

    if labels is not None and "decoder_input_ids" not in tensors:
        tensors["decoder_input_ids"] = _shifted(torch.as_tensor(labels), start_token)
    if "decoder_input_ids" not in tensors:
        raise CalibrationError(
            f"calibration sample {place} gives {', '.join(item) or 'nothing'}, but no ids that the "
            "model reads; give text beside it."
        )

    ids = tensors.pop("decoder_input_ids")
    mask = tensors.pop("decoder_attention_mask", torch.ones_like(ids))

    return CalibrationBatch(ids, mask, tensors, decoder=True)


def _shifted(labels: Tensor, start_token: int) -> Tensor:
    """What a decoder reads while it is to say `labels` [rows, tokens]."""
    labels = labels.masked_fill(labels == _IGNORED, start_token)
    start = torch.full_like(labels[:, :1], start_token)
    return torch.cat([start, labels[:, :-1]], 1)
