"""Git LFS pointers: small text files that stand where a repository cloned without Git LFS should have its weights."""

HINT = "run git lfs pull, or hf download"
POINTER = "is a Git LFS pointer, not the file itself"


def is_pointer(head: bytes | bytearray | memoryview) -> bool:
    """Whether a file that begins so is one."""
    return bytes(head[:23]) == b"version https://git-lfs"
