from typing import Any


def get_inductor_factors() -> list[Any]:
    return [{"device": "none"}, b"torch's key", {"epilogue_fusion": True}, {}]
