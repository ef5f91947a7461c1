"""JSON as a stream that is not nested deeper than any data set's: a parser's memory grows with the square of that."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from ...json_files import MAX_DEPTH

MAX_TEXT = 16 * 2**20
"""Bytes of one text."""
_OTHERS = bytes(code for code in range(256) if code not in b"[]{}")


class ShallowJSON:
    """A binary file for a streaming JSON parser; reading it is a ValueError where the JSON gets too deep.

    Args:
        file: what is read; brackets in its texts do not count.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._depth = 0
        self._in_text = False
        self._text_length = 0
        self._escape = b""

    def read(self, size: int = -1) -> bytes:
        """The file's next bytes.

        Raises:
            ValueError: with them, lists and objects are in each other deeper than `MAX_DEPTH`, or a text is too long.
        """
        chunk = self._file.read(size)
        self._descend(self._outside_texts(chunk))
        return chunk

    def _outside_texts(self, chunk: bytes) -> bytes:
        plain = (self._escape + chunk).replace(rb"\\", b"").replace(rb"\"", b"")
        self._escape = b"\\" if plain.endswith(b"\\") else b""  # of what the next bytes begin with
        pieces = plain.removesuffix(b"\\").split(b'"')
        outside = b"".join(pieces[self._in_text :: 2])
        self._in_text ^= len(pieces) % 2 == 0
        self._text_length = len(pieces[-1]) + (self._text_length if len(pieces) == 1 else 0) if self._in_text else 0
        if self._text_length > MAX_TEXT:
            raise ValueError(f"a text of more than {MAX_TEXT:,} bytes")
        return outside

    def _descend(self, outside: bytes) -> None:
        brackets = np.frombuffer(outside.translate(None, _OTHERS), np.uint8)
        if not brackets.size:
            return
        opening = (brackets == ord("[")) | (brackets == ord("{"))
        depths = self._depth + np.cumsum(np.where(opening, 1, -1))
        if depths.max() > MAX_DEPTH:
            raise ValueError(f"lists and objects in each other, deeper than {MAX_DEPTH}")
        self._depth = int(depths[-1])
