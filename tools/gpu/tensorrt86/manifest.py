"""What travels: compressed members in a row, cut into chunks. Standard library alone, for it is read there, too."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Member:
    """A file, or the archive ``base``; `sha256` is of the unpacked file, None for the archive."""

    name: str
    compressed_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Chunk:
    """A piece of all members in a row; all but the last have one size."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Members in their order, and the chunks that they were cut into."""

    members: tuple[Member, ...]
    chunks: tuple[Chunk, ...]

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """From the JSON that `write` wrote."""
        fields = json.loads(file.read_text(encoding="utf-8"))
        members = tuple(Member(**entry) for entry in fields["members"])
        return cls(members, tuple(Chunk(**entry) for entry in fields["chunks"]))

    def write(self, file: Path) -> None:
        """As JSON."""
        file.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def start_of(self, member: Member) -> int:
        """Where a member begins in the row of all chunks."""
        return sum(before.compressed_bytes for before in self.members[: self.members.index(member)])

    def chunks_of(self, member: Member) -> tuple[Chunk, ...]:
        """The chunks that a member lies in."""
        size, start = self.chunks[0].bytes, self.start_of(member)
        return self.chunks[start // size : (start + member.compressed_bytes - 1) // size + 1]

    def spans_of(self, member: Member) -> list[tuple[Chunk, int, int]]:
        """Those chunks with the part of each that is the member's: from, up to."""
        size, start = self.chunks[0].bytes, self.start_of(member)
        end, first = start + member.compressed_bytes, start // size
        return [
            (chunk, max(start - (first + i) * size, 0), min(end - (first + i) * size, chunk.bytes))
            for i, chunk in enumerate(self.chunks_of(member))
        ]


def sha256_of(file: Path) -> str:
    """Of a file that may be large."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
