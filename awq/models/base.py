"""`BaseAWQForCausalLM`: the object that AutoAWQ's users hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awq.config import AwqConfig
from awq.models.arguments import check_quantizer
from awq.models.generation import FusedGeneration
from awq.models.model import AwqModel
from awq.quantize import QuantReport


class BaseAWQForCausalLM(FusedGeneration, AwqModel):
    """A transformers model (`.model`) with AutoAWQ's `quantize`, `save_quantized`, `pack` and
    `generate`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stay_unfused()

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: Mapping[str, Any] | AwqConfig | None = None,
        calib_data: Any = "pileval",
        split: str = "train",
        text_column: str = "text",
        duo_scaling: bool = True,
        export_compatible: bool = False,
        apply_clip: bool = True,
        n_parallel_calib_samples: int | None = None,
        max_calib_samples: int | None = None,
        max_calib_seq_len: int = 512,
        max_chunk_memory: int = 1 << 30,
        quantizer_cls: Any = None,
        preset: str = "balanced",
        general_texts: bool = True,
        **options: Any,
    ) -> QuantReport:
        """Quantizes the model in place and returns the report.

        tokenizer: a tokenizer (None: the one beside the model), or calibration data itself: token
        ids ([samples, tokens] tensor, or a list of id tensors of any lengths), a tokenizer's
        output, or texts.
        quant_config: {"zero_point", "q_group_size", "w_bit", "version", "modules_to_not_convert"}.
        The other arguments are AutoAWQ's; n_parallel_calib_samples and max_chunk_memory are
        accepted and not needed, and a quantizer_cls of one's own is refused. general_texts: rows
        of the bundled text join
        texts that calibrate a language model's error feedback, so that it does not follow their
        domain alone; both are twice `max_calib_samples` rows (docs/calibration.md). Token ids
        stay alone.
        options: fields of `QuantizeOptions`. Raises ConfigError, CalibrationError or ModelError
        before any weight is touched.

        >>> from awq import AutoAWQForCausalLM
        >>> model = AutoAWQForCausalLM.from_pretrained("my-model")
        >>> report = model.quantize(calib_data=texts, quant_config={"q_group_size": 16})
        >>> report.loss < report.loss_rtn
        True
        >>> model.save_quantized("my-model-awq")
        """
        check_quantizer(quantizer_cls)
        return self._quantize(
            tokenizer,
            quant_config,
            calib_data,
            split=split,
            text_column=text_column,
            max_calib_samples=max_calib_samples,
            max_calib_seq_len=max_calib_seq_len,
            export_compatible=export_compatible,
            general_texts=general_texts,
            duo_scaling=duo_scaling,
            preset=preset,
            **{"clip": apply_clip, **options},
        )
