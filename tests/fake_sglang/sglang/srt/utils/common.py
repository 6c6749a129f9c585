from typing import Any


def add_prometheus_middleware(app: Any) -> None:
    from prometheus_client import CollectorRegistry, generate_latest, multiprocess

    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    app.append(lambda: generate_latest(registry).decode())


def broadcast_pyobj(data: list[Any], rank: int) -> list[Any]:
    return data if rank == 0 else []
