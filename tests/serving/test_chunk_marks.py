"""Where a hierarchical model begins its chunks, asked of the server."""

from __future__ import annotations

import asyncio

from tests.serving.conftest import Scripted, client, hierarchical, scripted_app, served
from treadle.serving.app import App
from treadle.serving.chunk_marks import ChunkMarks
from treadle.text.byte import ByteTokenizer


def test_marks_lie_where_characters_begin() -> None:
    model = hierarchical()
    text = "a🧵b — naïve"
    marks = ChunkMarks(model, ByteTokenizer()).of(text, 100)
    assert len(marks) == 1 and marks[0][0] == 0 and marks[0] == sorted(set(marks[0])) and max(marks[0]) < len(text)
    assert ChunkMarks(model, ByteTokenizer()).of("", 100) == []

    async def refused() -> list[int]:
        async with client(App(Scripted(), served(), marks=ChunkMarks(model, ByteTokenizer()))) as http:
            one = await http.post("/v1/chunks", json={"text": "x" * 1000})
        async with client(scripted_app()[0]) as http:
            return [one.status_code, (await http.post("/v1/chunks", json={"text": "x"})).status_code]

    assert asyncio.run(refused()) == [400, 400]
