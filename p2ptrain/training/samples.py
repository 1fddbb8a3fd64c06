"""Which samples this peer computes for the step under way.

Either it draws them by itself, as many as it likes, or the run leases them and it has those of its lease,
from the first one on. Which lease that is, the last entry says (`protocol.ledger`).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from p2ptrain.config import RunConfig
from p2ptrain.errors import LocalFault
from p2ptrain.protocol.ledger import Account, Ranges, account, follows, numbers, shuffled
from p2ptrain.records import EntryHeader, PeerId
from p2ptrain.replica.donor import Compute
from p2ptrain.replica.replica import Replica
from p2ptrain.tasks import Numbered, Task


class Samples:
    """Those that were begun, and what became of them. It begins anew with each step, and with each lease."""

    def __init__(self, run: RunConfig, task: Task, me: PeerId, replica: Replica) -> None:
        self._run, self._task, self._me, self._replica = run, task, me, replica
        self._data: Numbered | None = None
        """What they are leased from, once that is known; None: they are drawn."""
        self.lease: Ranges = ()
        """Where samples are leased, they are the first of these."""
        self.begun = 0
        self.skipped = 0
        """Of leased ones, those whose gradient was not finite."""
        self.skipped_for_good = 0
        """Of them, those before the last one that counts, as of a peer that trains apart only full inner
        batches do."""

    async def arrive(self, aside: Compute) -> None:
        """Where the run leases samples: find out how many there are. Raises LocalFault if the task's have no
        numbers."""
        if self._run.data == "leased":
            self._data = await aside(self._numbered)  # may read all of them

    def _numbered(self) -> Numbered:
        task = self._task
        if not isinstance(task, Numbered) or not task.size:
            raise LocalFault(
                f"run {self._run.run_id} leases samples by their number, and its task has none that are "
                'numbered; set data to "drawn" in the run file'
            )
        return task

    @property
    def may_be_had(self) -> bool:
        """Whether there are any for this peer: it draws them, or has a lease."""
        return self._data is None or bool(self.lease)

    @property
    def mostly_skipped(self) -> bool:
        """Whether so many of those that were begun do not count that nobody might ever fill the batch."""
        return 2 * self.skipped > self.begun

    def begin(self, lease: Ranges | None = None) -> None:
        """From the first one on, as if none had been computed; of another lease, if one is given."""
        self.lease = self.lease if lease is None else lease
        self.begun = self.skipped = self.skipped_for_good = 0

    def left(self, most: int) -> int:
        """How many this peer may still begin; where they are drawn, `most`."""
        if self._data is None:
            return most
        return sum(stop - start for start, stop in self.lease) - self.begun

    def next(self, count: int) -> int:
        """So many are begun; the number of the first of them in this step."""
        first = self.begun
        self.begun += count
        return first

    def spoilt(self, count: int) -> None:
        """Of those that were begun, the gradient of so many was not finite."""
        self.skipped += count if self.lease else 0

    def batch(self, step: int, held: Ranges, first: int, count: int) -> Any:
        """So many samples after the first ones of this step: drawn, or from that lease."""
        if (data := self._data) is None:
            return self._task.batch(step, self._me, first, count)
        places = numbers(held, first, count)
        return data.samples([shuffled(place, data.size, self._run.seed) for place in places])

    def taken(self, header: EntryHeader) -> dict[str, Any]:
        """Where samples are leased: what the next entry takes out of the data, and how that stands then, as
        `RoundCommitted` has it."""
        if header.data is None:
            return {}
        accounts = account(header.data, self._replica.position.weight + header.total_samples)
        taken = follows(self._replica.last, header, self._run.target_batch_size)
        return {"taken": taken, **asdict(accounts)}

    @property
    def account(self) -> Account | None:
        """What became of all samples of the run so far; None if they are drawn."""
        last, weight = self._replica.last, self._replica.position.weight
        return None if last is None or last.data is None else account(last.data, weight)
