"""Strings to prompt ids, path ids to text."""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer

from kestrel.config import ConfigError
from kestrel.moondream.config import PromptConfig

_PATH_TEXT = re.compile(r"[MmLlHhVvCcSsQqTtAaZz]|\d+|-")


class SegmentTokenizer:
    """A ``tokenizers`` file seen through what the segment skill needs."""

    def __init__(self, tokenizer: Tokenizer, prompt: PromptConfig) -> None:
        self.tokenizer = tokenizer
        self.prompt = prompt
        # Not how many there are: a vocabulary may leave ids out.
        self.size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        """Every id that it knows, added tokens included, is less."""
        self._path_text: dict[int, str] = {}
        for token_id in range(prompt.first_path_id, self.size):
            text = tokenizer.decode([token_id], skip_special_tokens=False).strip()
            if _PATH_TEXT.fullmatch(text):
                self._path_text[token_id] = text

    @classmethod
    def from_file(cls, path: Path, prompt: PromptConfig) -> SegmentTokenizer:
        """Read ``tokenizer.json``; raises ``ConfigError`` naming the file."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.encode_special_tokens = True  # as text: only objects are encoded
            # A file may keep the lengths of a batch that it was used for.
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return cls(tokenizer, prompt)
        except Exception as error:  # tokenizers raises bare Exception
            raise ConfigError(f"{path}: not a readable tokenizer file ({error})") from error

    def encode_object(self, noun: str) -> list[int]:
        """Ids of the noun as text: what spells a control token is encoded in two parts, so that no
        request can say more in the prompt than its noun."""
        encoding = self.tokenizer.encode(noun, add_special_tokens=False)
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id < self.prompt.first_path_id and end - start > 1:
                parts = noun[: start + 1], noun[start + 1 :]
                return [i for part in parts for i in self.encode_object(part)]
        return encoding.ids

    def decode_path_token(self, token_id: int) -> str:
        """The command letter, integer or minus sign that an id spells; "" if it is none."""
        return self._path_text.get(token_id, "")
