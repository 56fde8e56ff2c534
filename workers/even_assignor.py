"""Which worker gets which partitions: Faust's sticky assignment, made even.

Faust 0.15 bounds what a worker may hold and gives out what nobody holds, but takes nothing from those within the bound:
of 8 partitions the fifth of 5 workers got none, the others two each. So a worker added to a group that is behind could
stand idle. Its assignor has no setting for it, so the name that Faust calls is set here.
"""

from collections.abc import MutableMapping

from faust.assignor import partition_assignor
from faust.assignor.client_assignment import CopartitionedAssignment
from faust.assignor.copartitioned_assignor import CopartitionedAssignor


class EvenAssignor(CopartitionedAssignor):  # type: ignore[misc]
    """No worker has two partitions more than another, and as few as that allows move. Without standbys: no tables."""

    def get_assignment(self) -> MutableMapping[str, CopartitionedAssignment]:
        self._unassign_overassigned(active=True)  # what a worker that was overtaken still takes for its own
        workers = sorted(self._client_assignments.values(), key=lambda worker: -len(worker.actives))
        num_larger = self.num_partitions % len(workers)
        for place, worker in enumerate(workers):
            worker.unassign_extras(self.min_capacity + (place < num_larger), replicas=0)
        for partition in self._get_unassigned(active=True):
            min(workers, key=lambda worker: len(worker.actives)).assign_partition(partition, active=True)
        divided: MutableMapping[str, CopartitionedAssignment] = self._client_assignments
        return divided


def divide_evenly() -> None:
    partition_assignor.CopartitionedAssignor = EvenAssignor
