from typing import Any


class GroupCoordinator:
    def __init__(self, group: Any, use_shared_memory: bool, use_queue: bool = True) -> None:
        assert not use_shared_memory and not use_queue, "waits for the other ranks"
        self.group = group
