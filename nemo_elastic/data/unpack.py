"""Text out of files as they lie on disk: unpacked in a stream, decoded as UTF-8, bounded in memory and in expansion.

    bytes of the file -> unpacked bytes -> UTF-8 -> lines

At most a line is held. A file whose content grows to more than 500 times its size is refused: text shrinks to a
fifth, at most to a fiftieth, so that it is a decompression bomb or a file of one repeated byte.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from nemo_elastic.data.text_files import kind_and_packing

MOST_EXPANSION = 500
ALLOWED_ANYWAY = 1 << 26  # bytes that any file may grow to, however small it is
LONGEST_LINE = 1 << 26  # characters of a record
_BOM = "\ufeff"
_BROKEN = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of a byte that is no UTF-8
_UTF16 = tuple(mark.decode("utf-8", "surrogateescape") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


class Growth:
    """How much came out of a file, against its size.

    Raises:
        ValueError: from `add`, when it is too much to be text.
    """

    def __init__(self, file: Path) -> None:
        self.most, self.total = max(ALLOWED_ANYWAY, MOST_EXPANSION * file.stat().st_size), 0

    def add(self, count: int) -> None:
        """Note `count` more bytes."""
        self.total += count
        if self.total > self.most:
            raise ValueError(f"unpacks to more than {MOST_EXPANSION} times its size, which no text does; leave it out")


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a file; every defect of the packing is a ValueError."""

    def __init__(self, file: Path) -> None:
        self._source, self._growth = _opened(file), Growth(file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        try:
            data = self._source.read(len(buffer))
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise ValueError(f"is damaged or cut off ({error}); copy or pack the file again") from error
        self._growth.add(len(data))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._source.close()
        super().close()


def _opened(file: Path) -> BinaryIO:
    found = kind_and_packing(file)
    packing = found[1] if found else ""
    if packing == ".zst":
        return pyarrow_for(file).input_stream(str(file), compression="zstd")
    return {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[packing](file, "rb")


def pyarrow_for(file: Path) -> ModuleType:
    """The library that reads `.zst` and `.parquet`.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{file} needs pyarrow, which is not installed here; `pip install pyarrow`") from error
    return pyarrow


def lines(file: Path, longest: int = LONGEST_LINE, *, cut: bool = False) -> Iterator[tuple[int, str]]:
    r"""(number from 1, line with its `\n`) of a text file. Marks of byte order in front of lines are dropped.

    Args:
        longest: characters of a line.
        cut: give a longer line in pieces of that length; otherwise it is an error.

    Raises:
        ValueError: names the file, mostly the line: damaged packing, another encoding, no text.
    """
    number, whole = 0, True
    with io.TextIOWrapper(io.BufferedReader(_Unpacked(file)), encoding="utf-8", errors="surrogateescape") as text:
        while True:
            try:
                line = text.readline(longest)
            except ValueError as error:
                raise ValueError(f"{file} line {number + 1} {error}") from error
            if not line:
                return
            number += whole
            whole = line.endswith("\n")
            if not whole and len(line) >= longest and not cut:
                raise ValueError(f"{file} line {number} is longer than {longest:,} characters; is a record a line?")
            if not line.isascii():
                _check_encoding(file, number, line)
            if "\0" in line:
                words = "has zero bytes: it is no text, or UTF-16; convert it to UTF-8, or leave it out"
                raise ValueError(f"{file} line {number} {words}")
            yield number, line.removeprefix(_BOM)


def _check_encoding(file: Path, number: int, line: str) -> None:
    if number == 1 and line.startswith(_UTF16):
        words = "is UTF-16 or UTF-32, not UTF-8; convert it, e.g. `iconv -f UTF-16 -t UTF-8`"
        raise ValueError(f"{file} line 1 {words}")
    if broken := _BROKEN.search(line):
        byte = ord(broken[0]) - 0xDC00
        words = (
            f"has the byte 0x{byte:02x} where UTF-8 cannot have it; convert the file, e.g. `iconv -f LATIN1 -t UTF-8`"
        )
        raise ValueError(f"{file} line {number} {words} (`iconv -c -f UTF-8` drops such bytes)")
