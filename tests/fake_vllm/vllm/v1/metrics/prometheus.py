from prometheus_client import CollectorRegistry

REGISTRY = CollectorRegistry()


def get_prometheus_registry() -> CollectorRegistry:
    return REGISTRY
