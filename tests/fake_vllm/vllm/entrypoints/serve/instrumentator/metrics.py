from prometheus_client import generate_latest

from vllm.v1.metrics.prometheus import get_prometheus_registry


def page() -> str:
    return generate_latest(get_prometheus_registry()).decode()
