"""An embedding endpoint around a quantized model: `MODEL=DIRECTORY uvicorn embedding_server:app`
(pip install fastapi uvicorn)."""

import base64
import os
from array import array
from pathlib import Path
from typing import Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from awq import Encoder
from awq.errors import AwqError, ConfigError

app = FastAPI()
encoder = Encoder.from_pretrained(os.environ["MODEL"])
features = encoder.encode("a").numel()
name = Path(os.environ["MODEL"]).name


class Request(BaseModel):
    # token ids are those of this model's own tokenizer
    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"


@app.exception_handler(AwqError)
def refuse(_request, error: AwqError):
    return JSONResponse(
        {"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400
    )


@app.get("/v1/models")
def models():
    return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "awq"}]}


@app.post("/v1/embeddings")
def embeddings(request: Request):
    texts = [as_text(item) for item in as_list(request.input)]
    if not texts or not all(texts):
        raise ConfigError(
            "input is empty; give at least one text, each with at least one character."
        )
    vectors = encoder.encode(
        texts, normalize=True, truncate_dim=checked(request.dimensions)
    ).tolist()
    rows = [
        {"object": "embedding", "index": i, "embedding": shown(v, request)}
        for i, v in enumerate(vectors)
    ]
    tokens = sum(
        map(
            len,
            encoder.tokenizer(texts, truncation=True, max_length=encoder.max_seq_length)[
                "input_ids"
            ],
        )
    )
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "model": name, "data": rows, "usage": usage}


def as_list(given):
    single = isinstance(given, str) or (given and isinstance(given[0], int))
    return [given] if single else given


def as_text(item: str | list[int]) -> str:
    if isinstance(item, str):
        return item
    if not all(0 <= token < len(encoder.tokenizer) for token in item):
        raise ConfigError(
            f"token ids must be of this model's tokenizer, 0 to {len(encoder.tokenizer) - 1}."
        )
    return encoder.tokenizer.decode(item, skip_special_tokens=True)


def checked(dimensions: int | None) -> int | None:
    if dimensions is not None and not 1 <= dimensions <= features:
        raise ConfigError(f"dimensions is {dimensions}; this model has {features}.")
    return dimensions


def shown(vector: list[float], request: Request):
    return (
        vector
        if request.encoding_format == "float"
        else base64.b64encode(array("f", vector).tobytes()).decode()
    )
