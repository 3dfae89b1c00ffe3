"""The lab of the tests, of bench and of its knockers: all that is not a test.

Each module uses only those above it:

    hosts      two hosts in network namespaces, programs on them, configurations, waiting
    wire       messages, and both ends of the wire byte by byte
    servers    servers and clients of ours and of the reference; servers that turn hostile
    firewall   what the kernel has of ours, an nft that fails, what others do to the firewall
    floods     a third host that attacks, and who knocks meanwhile
    models     rooms of letmein.py in the test's own process, and models of what they have to do
    documents  blocks, commands and recipes of the documents, and hosts to follow them on
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where letmein.py is
# An assert in here says as much as one in a test.
for _name in ("hosts", "wire", "servers", "firewall", "floods", "models", "documents"):
    pytest.register_assert_rewrite(f"lab.{_name}")
