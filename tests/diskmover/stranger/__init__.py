"""A peer written from docs/wire-protocol.md alone, with nobody else's code.

It shares nothing with diskmover: Python's ssl, `blake3`, `zstandard` and a
CRC-32C of its own. What it understands, a stranger's peer can understand.

    content    bitmaps, hashes and digests
    frames     frames, and one TLS connection of them
    state      what STATE and DIRTY tell of a volume
    sender     a peer that sends
    receiver   a peer that receives
"""

from tests.diskmover.stranger.content import data_bytes_of, digest_of
from tests.diskmover.stranger.frames import Told, Wire, context, dial
from tests.diskmover.stranger.receiver import ALLOCATED, Volume, serve_one
from tests.diskmover.stranger.sender import Sender, push

__all__ = [
    "ALLOCATED",
    "Sender",
    "Told",
    "Volume",
    "Wire",
    "context",
    "data_bytes_of",
    "dial",
    "digest_of",
    "push",
    "serve_one",
]
