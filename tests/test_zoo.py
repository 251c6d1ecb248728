"""A sample of the zoo: two dozen kinds of all roles through the checks of `benchmarks/zoo.py`, with
the fastest preset. Kinds that are put together as one of these is are in the sweep alone."""

import dataclasses
import sys
from pathlib import Path

import pytest
import transformers

if not dataclasses.is_dataclass(transformers.LlamaConfig):
    pytest.skip("transformers has no settings as dataclasses", allow_module_level=True)

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from tiny_kinds import all_kinds
from zoo_checks import check

SAMPLE = {
    "causal": "gemma3_text phi3 gpt2 falcon bloom granite smollm3 mamba2 lfm2 recurrent_gemma "
    "qwen3_moe deepseek_v3",
    "vlm": "qwen2_5_vl gemma3 idefics3 mistral3 qwen2_audio",
    "seq2seq": "t5 bart m2m_100",
    "encoder": "t5 modernbert deberta-v2",
    "seqcls": "bert bart",
}
NAMES = [f"{type_}:{role}" for role, types in SAMPLE.items() for type_ in types.split()]
KINDS = {str(kind): kind for kind in all_kinds()}


@pytest.mark.parametrize("name", NAMES)
def test_sample(name, tmp_path):
    if name not in KINDS:
        pytest.skip(f"transformers has no {name}")
    result = check(KINDS[name], tmp_path, preset="fast", rows=8)
    assert result.step == "end"
    assert not result.failed(), result.to_dict()


def test_every_text_type_of_transformers_is_swept_or_left_out_for_a_reason():
    from tiny_kinds import EXCLUDED

    mapping = transformers.models.auto.modeling_auto
    swept = {kind.base for kind in all_kinds()} | set(EXCLUDED)
    causal, images = (
        mapping.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        mapping.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    pairs = mapping.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    assert not (set(causal) | set(images) | set(pairs)) - swept
    assert all(EXCLUDED.values())
