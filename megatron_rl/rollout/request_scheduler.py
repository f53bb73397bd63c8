"""One engine's part of a job: requests go out, samples come in."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from megatron_rl.rollout.engines.base import Finished, Request
from megatron_rl.rollout.multi_turn import Conversation, RolloutLimits, new_request
from megatron_rl.rollout.partial import PartialGroup, PartialRollout


class RequestScheduler:
    """Turns groups of work into requests and keeps the conversations."""

    def __init__(
        self,
        work: Sequence[PartialGroup],
        indices: Iterator[int],
        rules: RolloutLimits,
        on_done: Callable[[int, int, Conversation], None],
        on_group: Callable[[], None],
    ) -> None:
        """
        Args:
            indices: of the groups that this engine takes.
            on_done: told of (group, sample, conversation) when it is finished.
            on_group: told when all samples of a group are finished.
        """
        self._work = work
        self._indices = indices
        self._rules = rules
        self._on_done = on_done
        self._on_group = on_group
        self._next: deque[list[tuple[int, int, Conversation]]] = deque()
        self._asked: dict[int, list[tuple[int, int, Conversation]]] = {}
        self._num_asked = 0
        self._open = 0
        self._missing: dict[int, int] = {}
        self.unfinished: dict[tuple[int, int], Conversation] = {}
        """Those that are not finished, by (group, sample)."""

    def requests(self) -> Iterator[Request | None]:
        """What the engine works at; None while only answers can bring more."""
        while True:
            if not self._next:
                index = next(self._indices, None)
                if index is not None:
                    self._begin(index)
                    continue
                if self._open == 0 or self._rules.dialogue is None:
                    return
                yield None
                continue
            yield self._request(self._next.popleft())

    def take(self, finished: Finished) -> None:
        """What the engine has made of one sample."""
        index, sample, conversation = self._asked[finished.key][finished.sample]
        self._open -= 1
        if conversation.take(finished.completion):
            self._next.append([(index, sample, conversation)])
        elif conversation.finish_reason is not None:
            self._finish(index, sample, conversation)

    def _begin(self, index: int) -> None:
        """Samples that are not begun share a request; each of the others has come to another place."""
        group = self._work[index]
        open_ = [(i, sample) for i, sample in enumerate(group.samples) if isinstance(sample, PartialRollout)]
        self._missing[index] = len(open_)
        begun = [(index, i, Conversation(group.prompt, sample, self._rules)) for i, sample in open_]
        for place in begun:
            self.unfinished[place[0], place[1]] = place[2]
        for place in [place for place in begun if place[2].finish_reason is not None]:
            self._finish(*place)
        going = [place for place in begun if place[2].finish_reason is None and place[2].room > 0]
        fresh = [place for place in going if not place[2].sample.parts]
        if fresh:
            self._next.append(fresh)
        self._next.extend([place] for place in going if place[2].sample.parts)

    def _request(self, places: list[tuple[int, int, Conversation]]) -> Request:
        key, self._num_asked = self._num_asked, self._num_asked + 1
        self._asked[key] = places
        self._open += len(places)
        return new_request(key, [conversation for *_, conversation in places])

    def _finish(self, index: int, sample: int, conversation: Conversation) -> None:
        del self.unfinished[index, sample]
        self._on_done(index, sample, conversation)
        self._missing[index] -= 1
        if self._missing[index] == 0:
            self._on_group()
