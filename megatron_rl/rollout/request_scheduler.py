"""The requests of one engine's share of a job, and the collection of its results."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from megatron_rl.rollout.engines.base import Finished, Request
from megatron_rl.rollout.multi_turn import Conversation, RolloutLimits, new_request
from megatron_rl.rollout.partial import PartialGroup, PartialRollout


class RequestScheduler:
    """Turns the open samples of groups into engine requests and tracks their conversations."""

    def __init__(
        self,
        groups: Sequence[PartialGroup],
        indices: Iterator[int],
        limits: RolloutLimits,
        on_done: Callable[[int, int, Conversation], None],
        on_group_done: Callable[[], None],
    ) -> None:
        """
        Args:
            groups: all groups of the job, the same on every rank.
            indices: indices of the groups that this engine processes.
            limits: limits and settings of every conversation.
            on_done: called with (group index, sample index, conversation) when a sample is finished.
            on_group_done: called when all samples of a group are finished.
        """
        self._groups = groups
        self._indices = indices
        self._limits = limits
        self._on_done = on_done
        self._on_group_done = on_group_done
        self._queue: deque[list[tuple[int, int, Conversation]]] = deque()
        self._requested: dict[int, list[tuple[int, int, Conversation]]] = {}  # by request key
        self._num_requests = 0
        self._num_running = 0  # samples that the engine is generating
        self._num_missing: dict[int, int] = {}  # group index -> samples not finished
        self.unfinished: dict[tuple[int, int], Conversation] = {}
        """Conversations that are not finished, by (group index, sample index)."""

    def requests(self) -> Iterator[Request | None]:
        """Yield requests for the engine; None while further requests depend on results that are still missing."""
        while True:
            if not self._queue:
                index = next(self._indices, None)
                if index is not None:
                    self._begin(index)
                    continue
                if self._num_running == 0 or self._limits.multi_turn is None:
                    return
                yield None
                continue
            yield self._request(self._queue.popleft())

    def take(self, finished: Finished) -> None:
        """Process the engine's result for one sample."""
        index, sample, conversation = self._requested[finished.key][finished.sample]
        self._num_running -= 1
        if conversation.take(finished.completion):
            self._queue.append([(index, sample, conversation)])
        elif conversation.finish_reason is not None:
            self._finish(index, sample, conversation)

    def _begin(self, index: int) -> None:
        """Queue the open samples of a group.

        Samples without tokens share a request; each of the others has its own, because their tokens differ.
        """
        group = self._groups[index]
        open_ = [(i, sample) for i, sample in enumerate(group.samples) if isinstance(sample, PartialRollout)]
        self._num_missing[index] = len(open_)
        entries = [(index, i, Conversation(group.prompt, sample, self._limits)) for i, sample in open_]
        for entry in entries:
            self.unfinished[entry[0], entry[1]] = entry[2]
        for entry in [entry for entry in entries if entry[2].finish_reason is not None]:
            self._finish(*entry)
        active = [entry for entry in entries if entry[2].finish_reason is None and entry[2].num_tokens_left > 0]
        fresh = [entry for entry in active if not entry[2].sample.parts]
        if fresh:
            self._queue.append(fresh)
        self._queue.extend([entry] for entry in active if entry[2].sample.parts)

    def _request(self, entries: list[tuple[int, int, Conversation]]) -> Request:
        key, self._num_requests = self._num_requests, self._num_requests + 1
        self._requested[key] = entries
        self._num_running += len(entries)
        return new_request(key, [conversation for *_, conversation in entries])

    def _finish(self, index: int, sample: int, conversation: Conversation) -> None:
        del self.unfinished[index, sample]
        self._on_done(index, sample, conversation)
        self._num_missing[index] -= 1
        if self._num_missing[index] == 0:
            self._on_group_done()
