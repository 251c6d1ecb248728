"""`quantize_directory`: from one directory to another, for models that do not fit into memory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from awq.checkpoint.directory import check_target
from awq.checkpoint.shards import check_shard_size
from awq.checkpoint.source import Source, hub_arguments
from awq.checkpoint.work_folder import arguments_of, folder_for
from awq.config import AwqConfig
from awq.core.team import present_team
from awq.embed.directory import is_sentence_model
from awq.errors import ConfigError
from awq.models.auto import AutoAWQForCausalLM, AutoAWQForEmbedding
from awq.nn.memory import return_freed_memory
from awq.quantize import QuantReport


def quantize_directory(
    source: str | Path,
    output: str | Path,
    quant_config: Any = None,
    calib_data: Any = "pileval",
    *,
    torch_dtype: Any = "auto",
    trust_remote_code: bool = False,
    shard_size: str | int = "5GB",
    command: str | None = None,
    **options: Any,
) -> QuantReport:
    """Quantizes the model in `source` into `output` with one block in memory at a time.

    The weights are those that `AutoAWQForCausalLM.from_pretrained(source).quantize(…)` and
    `save_quantized(output)` give, bit for bit, in shards of one block each; directories of
    sentence-transformers are calibrated as embedding models, without an evaluation. What is in
    memory: the embeddings, the head, one block in float32 with its statistics, and the hidden
    states of the calibration tokens.

    source: directory or hub id of a full-precision model. output: the directory to write; it
    appears, or changes, when all of it is there. Finished blocks lie in `output`.awq-work
    meanwhile. torch_dtype, trust_remote_code: of `from_pretrained`. shard_size: largest file of
    what lies outside the blocks. command: what was typed, for the model card. options: further
    arguments of `quantize`.

    A run that ended early is taken up by another call with the same arguments, or by
    `resume_quantization(output)`, behind the last finished block, and gives the same bytes. With
    anything that decides about the result changed (weights, options, texts, versions) it is refused
    by name.

    Raises ConfigError, CalibrationError, ModelError or CheckpointError before any work starts, also
    when memory or the disk do not do, with the missing amount; ConfigError for what needs the whole
    model in memory: preset "best", `export_compatible`, an evaluation, blocks that share weights,
    and transformers before 5.

    >>> report = quantize_directory(
    ...     "my-model", "streamed-awq", {"q_group_size": 16}, calib_data=texts, preset="fast"
    ... )
    >>> report.loss < report.loss_rtn
    True
    """
    arguments = _as_json(
        source=_absolute(source),
        output=_absolute(output),
        quant_config=asdict(quant_config) if isinstance(quant_config, AwqConfig) else quant_config,
        calib_data=_absolute(calib_data),
        torch_dtype=str(torch_dtype).removeprefix("torch."),
        trust_remote_code=trust_remote_code,
        shard_size=shard_size,
        command=command,
        **options,
    )
    check_target(output, source)
    check_shard_size(shard_size)
    given = {name: options.pop(name) for name in hub_arguments(options)}
    embedding = is_sentence_model(source)
    if embedding and options.setdefault("evaluate", False) is not False:
        raise ConfigError("evaluate needs the whole model in memory; use `awq eval` afterwards.")

    opened = open_full_precision(source, trust_remote_code, **given)
    door = AutoAWQForEmbedding if embedding else AutoAWQForCausalLM
    return_freed_memory()
    team = present_team()

    with folder_for(output, arguments, writes=team.rank == 0) as work:
        model = door.streamed(opened, work, torch_dtype)
        report = model.quantize(model.tokenizer, quant_config, calib_data, **options)
        report.command = command
        if team.rank == 0:
            model.save_quantized(output, shard_size=shard_size)

        team.wait()

    return report


def open_full_precision(source: str | Path, trust_remote_code: bool, **download: Any) -> Source:
    """A checkpoint to quantize. Raises ConfigError for one that is quantized already."""
    opened = Source.open(source, trust_remote_code, **download)
    if opened.is_quantized:
        raise ConfigError(f"{source} is quantized already; give the full-precision model.")
    return opened


def resume_quantization(output: str | Path) -> QuantReport:
    """Goes on with a `quantize_directory` into `output` that ended early, with all of its options.

    Raises CheckpointError when there is none, or when it had calibration data in memory.
    """
    return quantize_directory(**arguments_of(output))


def _absolute(value: Any) -> Any:
    """A path without the folder that it is seen from; a hub id or other data as it is."""
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).exists()):
        return str(Path(value).expanduser().absolute())
    return value


def _as_json(**arguments: Any) -> dict[str, Any] | None:
    """Arguments as JSON holds them; None when calibration data or another object is among them."""
    if not isinstance(arguments["calib_data"], (str, type(None))) or "texts" in arguments:
        return None
    try:
        return json.loads(json.dumps(arguments))
    except TypeError:
        return None
