"""How the frames of a push are read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from diloco_server import service


def test_the_next_message_is_asked_for_before_the_last_one_is_dealt_with() -> None:
    """Else a peer, which may send little that nobody has asked for, waits while a frame is checked."""
    asked = []

    async def stream() -> AsyncIterator[bytes]:
        for number in range(3):
            asked.append(number)
            await asyncio.sleep(0)
            yield bytes([number])

    async def scenario() -> None:
        came = []
        async for message in service._ahead(stream(), 10.0, 3):
            came.append(message)
            assert asked == list(range(min(len(came) + 1, 3)))
        assert came == [b"\0", b"\1", b"\2"]

    asyncio.run(scenario())
