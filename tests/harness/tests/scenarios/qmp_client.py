"""Drives a daemon's monitor with PyPI's qemu.qmp: greeting, commands, errors, events, disconnect."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def main(path: str) -> None:
    client = QMPClient("scenario")
    await client.connect(path)
    commands = {command["name"] for command in await client.execute("query-commands")}
    assert {"blockdev-add", "block-export-add", "query-block-exports"} <= commands, commands

    exports = await client.execute("query-block-exports")
    assert [export["id"] for export in exports] == ["e"], exports

    try:
        await client.execute("block-export-del", {"id": "nobody"})
        raise AssertionError("deleting an export that does not exist worked")
    except ExecuteError as error:
        assert error.error.error.class_ == "GenericError", error

    with client.listener("BLOCK_EXPORT_DELETED") as deleted:
        await client.execute("block-export-del", {"id": "e"})
        event = await asyncio.wait_for(deleted.get(), 10)
        assert event["data"]["id"] == "e", event

    assert await client.execute("query-block-exports") == []
    await client.disconnect()


asyncio.run(main(sys.argv[1]))
