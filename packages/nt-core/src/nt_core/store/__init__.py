"""Kernel matrices on disk, tile by tile: computations that may be killed and go on, by one process or many.

Needs the extra `nt-core[store]`.
"""

from nt_core.store.kernel_store import KernelStore, Status
from nt_core.store.matrix import DamagedTiles, MissingTiles, StoredMatrix
from nt_core.store.plan import Plan, plan

__all__ = ["DamagedTiles", "KernelStore", "MissingTiles", "Plan", "Status", "StoredMatrix", "plan"]
