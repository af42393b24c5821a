"""Identity of the files of a source."""

from __future__ import annotations

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.rows import SourceFile


def source_files(index: Index) -> tuple[SourceFile, ...]:
    """Identity of every shard: its size and a hash of its header, which fixes where every tensor lies."""
    numbered = enumerate(index.shards)
    return tuple(SourceFile(index.name_of(s), s.size, index.digests.get(number) or s.header_hash()) for number, s in numbered)
