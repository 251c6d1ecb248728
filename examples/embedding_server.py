"""An embedding endpoint around a quantized model: `MODEL=DIRECTORY uvicorn embedding_server:app`
(pip install fastapi uvicorn). `DEVICE=cuda` serves on a GPU."""

import base64
import logging
import os
from pathlib import Path
from typing import Literal

import numpy as np
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from tokenizers import Tokenizer

from awq.errors import AwqError, ConfigError, ModelError

app = FastAPI()
path = Path(os.environ["MODEL"])


def opened():
    """On a CPU the compiled model without torch, which takes 0.13 GB; else torch runs it."""
    device = os.environ.get("DEVICE", "cpu")
    if device == "cpu":
        from awq import NativeEncoder

        try:
            return NativeEncoder.from_pretrained(path)
        except (ModelError, ImportError, OSError) as error:
            logging.getLogger("uvicorn.error").warning("Torch runs the model: %s", error)
    from awq import Encoder

    return Encoder.from_pretrained(path, device=device)


encoder = opened()
features = len(encoder.encode("a"))
tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
tokenizer.enable_truncation(encoder.max_seq_length)
tokenizer.no_padding()


class Request(BaseModel):
    # token ids are those of this model's own tokenizer
    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


@app.exception_handler(AwqError)
@app.exception_handler(RequestValidationError)
def refuse(_request, error: Exception):
    message = str(error)
    if isinstance(error, RequestValidationError):
        message = "; ".join(
            f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()
        )
    details = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": details}, status_code=400)


@app.get("/v1/models")
def models():
    return {"object": "list", "data": [{"id": path.name, "object": "model", "owned_by": "awq"}]}


@app.post("/v1/embeddings")
def embeddings(request: Request):
    texts = [as_text(item) for item in as_list(request.input)]
    if not texts or not all(texts):
        raise ConfigError(
            "input is empty; give at least one text, each with at least one character."
        )
    size = request.dimensions
    if size is not None and not 1 <= size <= features:
        raise ConfigError(f"dimensions is {size}; this model has {features}.")
    vectors = np.asarray(encoder.encode(texts, normalize=True, truncate_dim=size))
    rows = [
        {"object": "embedding", "index": i, "embedding": shown(vector, request.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    tokens = sum(len(found.ids) for found in tokenizer.encode_batch_fast(texts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    # a response of its own: FastAPI would look at every number of a list
    return JSONResponse({"object": "list", "model": path.name, "data": rows, "usage": usage})


def as_list(given):
    single = isinstance(given, str) or (given and isinstance(given[0], int))
    return [given] if single else given


def as_text(item: str | list[int]) -> str:
    if isinstance(item, str):
        return item
    most = tokenizer.get_vocab_size() - 1
    if not all(0 <= token <= most for token in item):
        raise ConfigError(f"token ids must be of this model's tokenizer, 0 to {most}.")
    return tokenizer.decode(item, skip_special_tokens=True)


def shown(vector, encoding: str):
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
