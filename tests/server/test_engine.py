"""Batches: everyone gets the answer to their own rows, whatever else is computed with them."""

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from consortium.server.serving.engine import MAX_WAITING, Lane, OverloadedError
from consortium.server.serving.tensors import RequestError


def test_what_waits_goes_into_one_batch_and_comes_back_apart() -> None:
    """While a slow graph runs, in a thread, twenty requests wait; they are one batch, each with its own rows."""
    threads = set()

    def slow(arrays: Any) -> dict[str, Any]:
        threads.add(threading.current_thread().name)
        time.sleep(0.05)
        return {"y": arrays["x"] * 2}

    async def main() -> int:
        lane = Lane(slow)
        first = asyncio.create_task(lane.predict({"x": np.full((1, 1), -1.0)}))
        await asyncio.sleep(0.02)
        asked = [np.arange(n + 1.0).reshape(-1, 1) + 10 * n for n in range(20)]
        found = await asyncio.gather(*(lane.predict({"x": one}) for one in asked))
        for one, answer in zip(asked, found, strict=True):
            np.testing.assert_array_equal(answer["y"], one * 2)
        assert (await first)["y"].tolist() == [[-2.0]]
        return lane.batches

    assert asyncio.run(main()) == 2
    assert "MainThread" not in threads


def test_one_request_that_fails_spoils_no_other() -> None:
    """Where a batch fails, each of its requests is computed alone."""

    def picky(arrays: Any) -> dict[str, Any]:
        time.sleep(0.02)
        if (arrays["x"] == 3).any():
            raise ValueError("three")
        return {"y": arrays["x"]}

    async def main() -> list[Any]:
        lane = Lane(picky)
        asked = (lane.predict({"x": np.full((1, 1), float(n))}) for n in range(6))
        return list(await asyncio.gather(*asked, return_exceptions=True))

    found = asyncio.run(main())
    assert isinstance(found[3], RequestError)
    assert [one["y"].item() for n, one in enumerate(found) if n != 3] == [0, 1, 2, 4, 5]


def test_more_than_can_wait_is_refused() -> None:
    """A caller is told at once, and what waits is answered."""

    def slow(arrays: Any) -> dict[str, Any]:
        time.sleep(0.05)
        return {"y": arrays["x"]}

    async def main() -> None:
        lane = Lane(slow)
        first = asyncio.create_task(lane.predict({"x": np.zeros((1, 1))}))
        await asyncio.sleep(0.02)
        second = asyncio.create_task(lane.predict({"x": np.zeros((MAX_WAITING, 1))}))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="rows wait already"):
            await lane.predict({"x": np.zeros((1, 1))})
        assert len((await first)["y"]) == 1
        assert len((await second)["y"]) == MAX_WAITING

    asyncio.run(main())
