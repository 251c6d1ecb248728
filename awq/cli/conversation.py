"""A conversation with a model: its messages, its slash commands, and what is forgotten when it
grows too long."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from awq.errors import ConfigError, ModelError

COMMANDS = {
    "/help": "this list",
    "/reset": "forget the conversation, keep the system prompt",
    "/system TEXT": "set the system prompt and forget the conversation; without TEXT there is none",
    "/retry": "answer the last message again",
    "/undo": "forget the last message and its answer",
    "/history": "show the conversation",
    "/save FILE": "write the conversation as JSON",
    "/exit": "end (also /quit, Ctrl-D)",
}


class Conversation:
    """Messages in the form of chat templates: {"role": "system" | "user" | "assistant", "content":
    text}."""

    def __init__(self, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.arguments = arguments
        self.messages: list[dict[str, str]] = []
        self.set_system(arguments.system)

    @classmethod
    def open(cls, arguments: argparse.Namespace) -> Conversation:
        """Loads the model. Raises ModelError when it has no tokenizer or no chat template,
        ConfigError for bad settings."""
        from awq import AutoAWQForCausalLM

        if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
            raise ConfigError("temperature must be 0 or more, and top-p above 0 and at most 1.")

        model = AutoAWQForCausalLM.from_quantized(
            arguments.model,
            device=arguments.device,
            torch_dtype=arguments.dtype,
            max_seq_len=arguments.max_seq_len,
        )
        tokenizer = model.tokenizer
        if tokenizer is None or not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                f"{arguments.model} has no chat template; use `awq generate` for a model that "
                "completes text."
            )
        return cls(model, tokenizer, arguments)

    def set_system(self, text: str | None) -> None:
        """Begins anew under a system prompt, or under none."""
        self.messages = [{"role": "system", "content": text}] if text else []

    @property
    def _head(self) -> int:
        """Messages that stay when others are forgotten: the system prompt."""
        return 1 if self.messages and self.messages[0]["role"] == "system" else 0

    def say(self, text: str) -> str:
        """Adds a message, writes the answer to stdout as it comes (with --json to nowhere), and
        returns it."""
        self.messages.append({"role": "user", "content": text})
        return self._answer()

    def take_back(self) -> None:
        """Forgets the last message of the user and what follows it."""
        while len(self.messages) > self._head:
            if self.messages.pop()["role"] == "user":
                return

    def command(self, line: str) -> bool:
        """Runs a slash command; whether the conversation goes on."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit"):
            return False

        if name == "/help":
            self._note("\n".join(f"{command:14s}{about}" for command, about in COMMANDS.items()))
        elif name == "/reset":
            self.messages = self.messages[: self._head]
        elif name == "/system":
            self.set_system(rest)
        elif name == "/undo":
            self.take_back()
        elif name == "/retry":
            self._retry()
        elif name == "/history":
            self._note(
                "\n".join(f"{message['role']}: {message['content']}" for message in self.messages)
                or "(empty)"
            )
        elif name == "/save":
            self._save(rest)
        else:
            self._note(f"{name} is no command; /help lists them.")

        return True

    def _retry(self) -> None:
        if not any(message["role"] == "user" for message in self.messages):
            self._note("there is no message to answer again.")
            return
        while self.messages[-1]["role"] != "user":
            self.messages.pop()
        self._answer()

    def _save(self, name: str) -> None:
        if not name:
            self._note("/save needs the name of a file.")
            return

        try:
            Path(name).write_text(
                json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
            )
        except OSError as error:
            self._note(f"{name} cannot be written: {error}.")
            return

        self._note(f"saved to {name}")

    def _answer(self) -> str:
        from transformers import TextStreamer

        inputs = self._inputs()
        length = inputs["input_ids"].shape[1]
        room = self.arguments.max_seq_len - length
        streamer = None
        if not self.arguments.json:
            streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)

        out = self.model.generate(
            **inputs,
            max_new_tokens=min(self.arguments.max_new_tokens, room),
            streamer=streamer,
            **self._sampling(),
        )
        text = self.tokenizer.decode(out[0, length:], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": text})

        return text

    def _sampling(self) -> dict[str, Any]:
        if self.arguments.temperature == 0:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.arguments.temperature,
            "top_p": self.arguments.top_p,
        }

    def _inputs(self) -> dict[str, Any]:
        """Token ids of the conversation; the oldest turns are forgotten until an answer fits.

        Raises ConfigError when the last message alone does not fit.
        """
        from awq.calibration.templates import apply_chat_template

        longest = self.arguments.max_seq_len - min(
            self.arguments.max_new_tokens, self.arguments.max_seq_len // 4
        )
        while True:
            inputs = apply_chat_template(
                self.tokenizer,
                self.messages,
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            length = inputs["input_ids"].shape[1]
            if length <= longest:
                return {
                    name: inputs[name].to(self.model.device)
                    for name in ("input_ids", "attention_mask")
                }
            if sum(message["role"] == "user" for message in self.messages) < 2:
                self.take_back()
                raise ConfigError(
                    f"the message has {length} tokens, and {longest} fit; raise --max-seq-len."
                )
            self._forget_oldest_turn()

    def _forget_oldest_turn(self) -> None:
        head = self._head
        following = [
            i for i, message in enumerate(self.messages) if message["role"] == "user" and i > head
        ]
        self.messages = self.messages[:head] + self.messages[following[0] :]
        self._note("(the oldest turn no longer fits and is forgotten)")

    def _note(self, text: str) -> None:
        print(text, file=sys.stderr)
