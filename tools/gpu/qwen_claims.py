"""The claims about Qwen3.5 on one GPU and on several, checked on the records of `check_qwen.py` and `qwen_ranks.py`."""

from __future__ import annotations

from typing import Any

from aot_cache.runtime.ledger import HARMFUL

Json = Any
PARTS = ("build", "serve", "budget", "judge", "eager", "cold", "mega", "tune", "tuned")


def claims(record: Json, more: float = 1.0) -> Json:
    """Claim → whether the record shows it. `more`: factor by which our distance from float32 may exceed the usual limit."""
    made: Json = {}
    parts = [name for name in PARTS if name in record]
    made["every part ran"] = not [name for name in parts if "error" in record[name]]
    if not made["every part ran"]:
        return made
    if "serve" in record:
        serve = record["serve"]
        made["every size of target and draft is captured"] = serve["captured"] > 0 and not serve["lost"]
        made["ledger: zero events from ready on"] = not set(HARMFUL) & set(serve["ledger_after_ready"])
        made["independent hooks: zero events from ready on"] = not serve["independent_after_ready"]
        made["ledger: nothing is compiled or tuned while loading"] = not set(serve["ledger_while_loading"]) - {
            "module_load"
        }
        made["every number of drafts held"] = set(serve["held"]["oracle"]) == {"0", "1", "2"}
        made["an oracle's drafts change no token"] = serve["same with an oracle"] == serve["requests"]
    if "judge" in record:
        gaps, hidden = record["judge"]["gaps"], record["judge"]["hidden"]
        made["hidden states as near to float32's as transformers' bfloat16"] = (
            hidden["ours"] <= 1.1 * hidden["bfloat16"] * more
        )
        made["tokens as near to float32's as transformers' bfloat16"] = (
            gaps["ours"]["largest"] <= 1.5 * gaps["bfloat16"]["largest"] * more
            and gaps["ours"]["different"] <= 1.1 * gaps["bfloat16"]["different"] * more
        )
    if {"serve", "eager", "cold", "mega"} <= set(parts):
        floor = record["eager"]["start_seconds"]
        beyond = serve["start_seconds"] - floor
        for name, most in (("cold", 0.10), ("mega", 0.30)):
            record[f"start beyond eager, of {name}"] = ratio = round(
                beyond / (record[name]["start_seconds"] - floor), 4
            )
            made[f"start beyond eager at most {most} of {name}"] = ratio <= most
    if {"tuned", "cold"} <= set(parts):
        for name in ("tuned", *(["serve"] if "serve" in record else [])):
            plain = record["cold"]["steady"]
            record[f"{name} step over cold"] = {s: round(t / plain[s], 4) for s, t in record[name]["steady"].items()}
        made["tuned steps at most 1.02 of ordinary compile"] = max(record["tuned step over cold"].values()) <= 1.02
    return made


def compared(serve: Json) -> list[list[int]]:
    """Remove the tokens from the answer of `serve`, and add how many requests have equal tokens with an oracle's drafts."""
    tokens = serve.pop("tokens")
    own: list[list[int]] = tokens["own drafts"]
    serve["requests"], serve["same with an oracle"] = len(own), sum(map(list.__eq__, own, tokens["oracle"]))
    return own
