"""Dynamic batching, as inference servers do it: what comes while a call runs goes into the next call, together."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


class Batcher(Generic[Ask, Answer]):
    """`work` answers a list of questions in their order; it runs in one thread, one call at a time."""

    def __init__(self, work: Callable[[Sequence[Ask]], Sequence[Answer]], name: str) -> None:
        self._work, self._thread, self._turn = work, ThreadPoolExecutor(1, name), asyncio.Lock()
        self._waiting: list[tuple[Ask, asyncio.Future[Answer]]] = []

    async def ask(self, question: Ask) -> Answer:
        """Raises what `work` raised in the call that took this question along."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        await asyncio.shield(self._turn_of(answer))  # who is cancelled must not take the others along
        return await answer

    async def _turn_of(self, answer: asyncio.Future[Answer]) -> None:
        async with self._turn:
            if not answer.done():  # not taken along by the turn before
                await self._call()

    async def _call(self) -> None:
        taken, self._waiting = self._waiting, []
        questions = [question for question, _ in taken]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, self._work, questions)
        except Exception as error:
            for _, answer in taken:
                answer.set_exception(error)
        else:
            for (_, answer), one in zip(taken, found, strict=True):
                answer.set_result(one)
