"""Identity of the files of a source."""

from __future__ import annotations

import hashlib
import struct

from streamconv.checkpoint.index import Index
from streamconv.checkpoint.rows import SourceFile


def source_files(index: Index) -> tuple[SourceFile, ...]:
    """Identity of every shard: its size and a hash of its header, which fixes where every tensor lies."""
    files = []
    for number, shard in enumerate(index.shards):
        if number in index.digests:
            files.append(SourceFile(index.name_of(shard), shard.size, index.digests[number]))
            continue
        with shard.window(0, 8) as length:
            size = 8 + int(struct.unpack("<Q", bytes(length[:8]))[0])
        with shard.window(0, size) as header:
            digest = hashlib.sha256(header).hexdigest()
        files.append(SourceFile(index.name_of(shard), shard.size, digest))
    return tuple(files)
