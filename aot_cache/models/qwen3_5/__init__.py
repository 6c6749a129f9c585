"""Qwen3.5 as it is served: transformers' modules and MTP draft, fla-core's gated delta rule, static caches."""
