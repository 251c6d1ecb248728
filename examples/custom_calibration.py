"""Every kind of calibration data that `quantize` takes, on one model.

    python examples/custom_calibration.py MODEL

Which one to choose: docs/calibration.md. The figure beside each is the mean output error of the
linears on the calibration data itself; compare models with `awq eval` on other text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from awq import AutoAWQForCausalLM, clean_texts

TEXTS = [
    "The turbine was inspected after 4,000 hours, and two blades were replaced.",
    "Please restart the pump, then read the pressure at the second gauge.",
    "Vibration above 7 mm/s calls for a stop within the hour.",
]
CHATS = [
    [
        {"role": "user", "content": "What does the second gauge show?"},
        {"role": "assistant", "content": "The pressure behind the pump, in bar."},
    ]
]


def sources(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """One piece of data for each kind; chats only where the tokenizer has a template."""
    lines = folder / "texts.jsonl"
    lines.write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    found: dict[str, Any] = {
        "texts": clean_texts(TEXTS),
        "a file": str(lines),
        "token ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "the bundled text": None,
    }
    if tokenizer.chat_template:
        found["chats"] = CHATS
    return found


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the output error by kind of data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--group-size", type=int, default=128)
    arguments = parser.parse_args(argv)
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoAWQForCausalLM.from_pretrained(arguments.model).tokenizer
        for kind, data in sources(tokenizer, Path(folder)).items():
            model = AutoAWQForCausalLM.from_pretrained(arguments.model)
            report = model.quantize(
                tokenizer,
                quant_config={"q_group_size": arguments.group_size},
                calib_data=data,
                text_column="body",  # of the file; other kinds have no columns
                max_calib_samples=16,
                preset="fast",
            )
            errors[kind] = report.loss
            print(f"{kind}: {report.tokens} tokens, output error {report.loss:.4f}")
    return errors


if __name__ == "__main__":
    main()
