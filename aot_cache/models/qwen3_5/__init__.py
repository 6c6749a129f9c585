"""Qwen3.5 for serving: transformers' modules and MTP draft, fla-core's gated delta rule, static caches."""
