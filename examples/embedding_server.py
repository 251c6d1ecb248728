"""An embedding endpoint around a quantized model: `MODEL=DIRECTORY uvicorn embedding_server:app` (pip install fastapi uvicorn)."""

import os

from fastapi import FastAPI
from pydantic import BaseModel

from awq import Encoder

app = FastAPI()
encoder = Encoder.from_pretrained(os.environ["MODEL"])


class Request(BaseModel):
    input: str | list[str]


@app.post("/v1/embeddings")
def embeddings(request: Request):
    texts = [request.input] if isinstance(request.input, str) else request.input
    vectors = encoder.encode(texts, normalize=True).tolist()
    return {"object": "list", "data": [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]}
