import hashlib
import json
from dataclasses import fields
from typing import Any


def get_hash_factors(config: Any, ignored_factors: set[str]) -> dict[str, object]:
    named = [one.name for one in fields(config) if one.name not in ignored_factors]
    return {name: getattr(config, name) for name in named}


def hash_factors(items: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()
