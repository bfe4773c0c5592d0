"""The sagas: what a move, a confirm and a revert do, step by step.

One file per saga. Each is data (`SAGA`, a list of steps with their undos) that
the kernel runs and that the API, the docs and the tests iterate over.
"""

from controlplane.sagas.common import MigrationParams
from controlplane.sagas.confirm import SAGA as CONFIRM
from controlplane.sagas.move import SAGA as MOVE
from controlplane.sagas.resources import MoveResources
from controlplane.sagas.revert import SAGA as REVERT

ALL = (MOVE, CONFIRM, REVERT)

__all__ = ["ALL", "CONFIRM", "MOVE", "REVERT", "MigrationParams", "MoveResources"]
