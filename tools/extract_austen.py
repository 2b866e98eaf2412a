"""Repeats the extraction of treadle/corpus/austen.txt.xz from Debian's package r-cran-janeaustenr.

    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb package
    python tools/extract_austen.py package/usr/lib/R/site-library/janeaustenr/data austen.txt.xz

The package keeps each novel as an R character vector in an R lazy-load database: zlib-compressed records, each a
4-byte big-endian length and an XDR serialisation in which a string is (flags with type 9, length, bytes). Lines are
joined with line feeds, novels with nothing. The text's SHA-256 is asserted.
"""

from __future__ import annotations

import hashlib
import lzma
import struct
import sys
import zlib
from pathlib import Path

SHA256 = "a94dcb6b4d3c84f46edf97cd3efe5a76ab069fe827457a0042bf2d45e4b1dc26"
ORDER = ("EMMA", "PRIDE AND PREJUDICE", "SENSE AND SENSIBILITY", "MANSFIELD PARK", "NORTHANGER ABBEY", "PERSUASION")
CHARACTER_STRING = 9  # CHARSXP in R's serialisation format
HEADER = 14


def records(database: bytes) -> list[bytes]:
    """Every compressed record, unpacked: records stand one after another, so zlib finds where each ends."""
    found, at = [], 0
    while at < len(database) - 4:
        unpacker = zlib.decompressobj()
        found.append(unpacker.decompress(database[at + 4 :]))
        at = len(database) - len(unpacker.unused_data)
    return found


def strings(record: bytes) -> list[str]:
    """All character strings of one serialised object, in order."""
    found, at = [], HEADER
    while at < len(record) - 8:
        flags, length = struct.unpack(">Ii", record[at : at + 8])
        if flags & 0xFF == CHARACTER_STRING and 0 <= length < 100_000 and at + 8 + length <= len(record):
            try:
                found.append(record[at + 8 : at + 8 + length].decode("utf-8"))
                at += 8 + length
                continue
            except UnicodeDecodeError:
                pass
        at += 1
    return found


def main(folder: Path, output: Path) -> None:
    found = [lines for lines in map(strings, records((folder / "Rdata.rdb").read_bytes())) if len(lines) > 5000]
    novels = {lines[0].upper(): "\n".join(lines) for lines in found}
    text = "".join(novels[title] for title in ORDER)
    digest = hashlib.sha256(text.encode()).hexdigest()
    print(f"{len(novels)} novels, {len(text.encode()):,} bytes, sha256 {digest}")
    if digest != SHA256:
        sys.exit("the text is not the bundled one; has the package changed?")
    output.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
