"""`Encoder`: texts to embeddings, from quantized or full-precision directories, without further
packages.

It reads what sentence-transformers wrote and gives the same embeddings. It is quicker than that
package's loop because all texts are tokenized in one call, sorted by tokens instead of characters,
and a batch ends where padding would begin to cost.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awq.checkpoint.load import body_class, load_model
from awq.checkpoint.source import Source, check_reachable
from awq.checkpoint.tokenizer import load_tokenizer
from awq.embed.batching import batches_by_length
from awq.embed.compiled import CompiledEncoder, CompiledState
from awq.embed.directory import SentenceSettings, longest_input, sentence_settings
from awq.embed.graphs import EncoderGraphs
from awq.embed.heads import Normalize, Pooling, read_head, through_heads
from awq.embed.proof import COMPILING, try_to_compile
from awq.embed.request import check_precision
from awq.embed.tokens import QuickTokens, check_ids, known_ids, padding_id, quick_tokens
from awq.errors import ConfigError, ModelError, first_line
from awq.native.request import check_arguments, checked_texts
from awq.nn.locks import lock_of
from awq.nn.modes import ordinary_arithmetic
from awq.nn.surgery import usable_device

logger = logging.getLogger("awq.embed")


# of a hub repository; exports for other runtimes are not needed
_KEPT = ["*.json", "*.txt", "*.model", "*.safetensors", "*.py"]


class Encoder(nn.Module):
    """model: a transformers encoder in evaluation mode, whose call gives `last_hidden_state`
    [texts, tokens, features].

    heads: a `Pooling`, then any `Dense` and `Normalize`; None means mean pooling. settings: prompts
    and longest input. `Encoder.from_pretrained(directory)` fills all of it in.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        heads: Sequence[nn.Module] | None = None,
        settings: SentenceSettings | None = None,
    ) -> None:
        super().__init__()
        # AutoAWQForEmbedding's own wrapper
        model = model.model if hasattr(model, "awq_config") else model
        self.model = model
        self.tokenizer = tokenizer
        self.heads = nn.ModuleList(heads or [Pooling()])
        if not isinstance(self.heads[0], Pooling):
            raise ModelError(
                f"the first module after the transformer is {type(self.heads[0]).__name__}; it "
                "must be a pooling."
            )

        settings = settings or SentenceSettings()
        self.quick_tokens: QuickTokens | None = None
        self.max_seq_length = longest_input(model.config, tokenizer, settings)

        # What models without prompts of their own answer to too, so that callers need not know
        # which they hold.
        self.prompts = {"query": "", "document": "", **settings.prompts}
        self.default_prompt_name = settings.default_prompt_name
        self.truncate_dim = settings.truncate_dim
        self._lower_case = settings.lower_case
        self.known_ids = known_ids(model, tokenizer)

        # Of inputs by name; the attention mask's is 0.
        self.padding = {
            "input_ids": padding_id(model, tokenizer),
            "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
        }
        self._graphs = EncoderGraphs(self)
        self._precision = "exact"
        self._native: CompiledEncoder | None = None
        self._native_state: CompiledState | None = None  # None: not tried yet
        accepted = inspect.signature(model.forward).parameters

        if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            self._accepted = None
        else:
            self._accepted = set(accepted)

    @property
    def max_seq_length(self) -> int:
        """How many tokens of a text are read; the rest is cut off. It may be set."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        self._max_seq_length = tokens
        self.quick_tokens = quick_tokens(self.tokenizer, tokens)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | None = None,
        dtype: Any = "auto",
        trust_remote_code: bool = False,
        precision: str = "exact",
    ) -> Encoder:
        """From a sentence-transformers or plain transformers directory, or a hub id, quantized or
        not.

        device: None takes the GPU if there is one. A plain directory says nothing about pooling:
        mean pooling without normalisation is used, with a warning. precision: "int8" gives the
        compiled program of a CPU activations of 8 bits instead of 16, for speed. Raises ModelError
        or CheckpointError when there is no such model, ConfigError for a precision that is unknown
        or not for this device.
        """
        place = usable_device(device)  # before anything is read or fetched
        check_precision(precision, place)
        root = Path(path)
        if not root.exists() and not str(path).startswith((".", "/", "~")):
            root = _downloaded(str(path))

        settings = sentence_settings(root)
        body = settings.modules[0][1] if settings.modules else root
        source = Source.open(body, trust_remote_code)
        kind = body_class(source)
        if getattr(source.config, "is_encoder_decoder", False) and not kind.__name__.endswith(
            "EncoderModel"
        ):
            raise ModelError(
                f"{path} is an encoder-decoder model; use SentenceTransformer({str(path)!r}) for "
                "it."
            )

        encoder = cls.around(
            load_model(source, dtype, kind=kind), root, trust_remote_code=trust_remote_code
        )
        encoder._precision = precision

        return encoder.to(place).eval()

    @classmethod
    def around(
        cls,
        model: Any,
        path: str | Path,
        tokenizer: Any = None,
        trust_remote_code: bool = False,
    ) -> Encoder:
        """A loaded model with the heads, prompts and (None) tokenizer of its local directory.
        Raises like `from_pretrained`."""
        settings = sentence_settings(path)
        if settings.modules and settings.modules[0][0] != "Transformer":
            raise ModelError(
                f"{path} begins with a module of kind {settings.modules[0][0]}, not with a "
                "transformer."
            )

        heads = [read_head(kind, folder) for kind, folder in settings.modules[1:]]
        if not heads:
            logger.warning(
                "%s names no pooling (no modules.json): mean pooling without normalisation is "
                "used.",
                path,
            )

        body = settings.modules[0][1] if settings.modules else path
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(body, trust_remote_code)
        encoder = cls(model, tokenizer, heads, settings)
        encoder.heads.to(
            encoder.device
        )  # the model stays where it is, its weights may be elsewhere

        return encoder

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @torch.no_grad()
    @ordinary_arithmetic()
    def encode(
        self,
        texts: str | Sequence[str],
        batch_size: int = 32,
        normalize: bool = False,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        prompt: str | None = None,
    ) -> Tensor:
        """Embeddings, float32 on the CPU: [texts, features] in the order given, or [features] for a
        single string.

        batch_size: at most so many texts at once. normalize: L2 norm 1, after truncating (the
        model's own normalisation happens in any case). prompt_name: key of `prompts`, put before
        every text; prompt: that text itself.
        truncate_dim: keep the first so many features; None: what the directory says. Raises
        ConfigError for arguments that cannot work.

        >>> from awq import Encoder
        >>> encoder = Encoder.from_pretrained("my-encoder", device="cpu")
        >>> encoder.encode(["an old tree", "the red house"], normalize=True).shape
        torch.Size([2, 32])
        """
        if isinstance(texts, str):
            return self.encode([texts], batch_size, normalize, prompt_name, truncate_dim, prompt)[0]

        texts = checked_texts(texts)
        check_arguments(truncate_dim, prompt, batch_size)
        truncate_dim = self.truncate_dim if truncate_dim is None else truncate_dim
        before = prompt if prompt is not None else self.prompt_text(prompt_name)
        rows = self._tokenize([before + text for text in texts])
        prompt_tokens = self._prompt_tokens(before)
        native = self.native
        if native is not None and native.takes(rows["input_ids"]):
            embeddings = self._encode_natively(native, rows, prompt_tokens)[:, :truncate_dim]
            return F.normalize(embeddings, dim=-1) if normalize else embeddings

        parts = list(batches_by_length([len(ids) for ids in rows["input_ids"]], batch_size))
        run: Any = self
        if self._on_gpu:
            run = self._graphs
            run.look()

        # on the model's device until the end: a copy after each batch would make a GPU wait for it
        found = []
        for part in parts:
            embeddings = run(
                {key: self._padded(key, [values[i] for i in part]) for key, values in rows.items()},
                prompt_tokens,
            )
            embeddings = embeddings[:, :truncate_dim].float()
            found.append(F.normalize(embeddings, dim=-1) if normalize else embeddings)

        together = torch.cat(found).cpu()
        return together[torch.tensor([i for part in parts for i in part]).argsort()]

    @property
    def compiled(self) -> CompiledState:
        """Whether texts run through one native program (CPUs only), and if not, why. True or False
        in an `if`.

        The program is made and proven when the first text is encoded, or here.
        """
        if self._on_gpu:
            return CompiledState(False, "the model is on a GPU")
        self._native_program()
        assert self._native_state is not None
        return self._native_state

    @property
    def native(self) -> CompiledEncoder | None:
        """The program that `compiled` speaks of."""
        return self._native_program() if not self._on_gpu else None

    def _native_program(self) -> CompiledEncoder | None:
        if self._native_state is None:
            with COMPILING:
                if self._native_state is None:
                    self._native, self._native_state = self._compile()
        return self._native

    @torch.no_grad()
    def _compile(self) -> tuple[CompiledEncoder | None, CompiledState]:
        pooling = self.heads[0]
        assert isinstance(pooling, Pooling)
        normalize = len(self.heads) > 1 and isinstance(self.heads[1], Normalize)
        return try_to_compile(
            "encoder", self.model, tuple(pooling.modes), normalize, self._precision
        )

    def _encode_natively(
        self,
        native: CompiledEncoder,
        rows: dict[str, list[list[int]]],
        prompt_tokens: int,
    ) -> Tensor:
        """Embeddings [texts, features] in the order of the rows."""
        types = rows.get("token_type_ids")
        embeddings = native.embeddings(rows["input_ids"], types, prompt_tokens)
        inside = 2 if native.spec.normalize else 1  # heads that are part of the program
        for head in list(self.heads)[inside:]:
            embeddings = head(embeddings)

        return embeddings

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: they compile anew."""
        return self.__dict__ | {"_native": None, "_native_state": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Encoder:
        self._native = self._native_state = None  # it holds weights of its own
        return super()._apply(fn, recurse)

    def forward(self, inputs: dict[str, Tensor], prompt_tokens: int = 0) -> Tensor:
        """Embeddings [texts, features] of padded inputs [texts, tokens], padding on the right."""
        device = self.device
        inputs = {
            key: value.to(device)
            for key, value in inputs.items()
            if self._accepted is None or key in self._accepted
        }
        hidden = self.model(**inputs).last_hidden_state

        return through_heads(self.heads, hidden, inputs["attention_mask"], prompt_tokens)

    def prompt_text(self, name: str | None = None) -> str:
        """The text of a prompt; None means the default one, which may be empty. Raises ConfigError
        for an unknown name."""
        name = name if name is not None else self.default_prompt_name
        if name is not None and (not isinstance(name, str) or name not in self.prompts):
            raise ConfigError(
                f"prompt_name is {name!r:.100}; the model's prompts are {', '.join(self.prompts)}."
            )
        return self.prompts[name] if name is not None else ""

    def cased(self, text: str) -> str:
        """The text in lower case where the directory's `do_lower_case` says so."""
        return text.lower() if self._lower_case else text

    def _tokenize(self, texts: list[str]) -> dict[str, list[list[int]]]:
        """Input name → one row per text, without padding."""
        rows = self._rows([self.cased(text) for text in texts])
        if self.known_ids is not None:
            check_ids(rows["input_ids"], self.known_ids)
        # an empty text, with a tokenizer that adds no special tokens
        if any(not ids for ids in rows["input_ids"]):
            pad = self.padding["input_ids"]
            fill = {"input_ids": [pad], "token_type_ids": [0], "attention_mask": [1]}
            for key, values in rows.items():
                rows[key] = [row or fill[key] for row in values]

        mask = [[1] * len(ids) for ids in rows["input_ids"]]
        return {"attention_mask": mask, **rows}

    def _rows(self, texts: list[str]) -> dict[str, list[list[int]]]:
        if self.quick_tokens is not None:
            return self.quick_tokens(texts)

        # a fast tokenizer keeps padding and truncation as state, and borrows itself only once
        with lock_of(self.tokenizer):
            found = self.tokenizer(texts, truncation=True, max_length=self.max_seq_length)
        names = ("input_ids", "token_type_ids", "attention_mask")

        return {name: found[name] for name in names if name in found}

    def _prompt_tokens(self, prompt: str) -> int:
        pooling = self.heads[0]
        if not prompt or (isinstance(pooling, Pooling) and pooling.include_prompt):
            return 0
        ids = self._tokenize([prompt])["input_ids"][0]
        # a closing special token is not the prompt's
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)

    def _padded(self, key: str, rows: list[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor(
            [row + [self.padding.get(key, 0)] * (longest - len(row)) for row in rows]
        )


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    check_reachable(name)
    try:
        return Path(snapshot_download(name, allow_patterns=_KEPT))
    except Exception as error:  # the hub's client has many ways to fail
        raise ModelError(
            f"model {name} is no local directory and cannot be fetched: {first_line(error)}"
        ) from error
