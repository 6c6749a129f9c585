"""vLLM, unmodified: its plug-in entry point loads the bundle in each worker.

Tested against the source of vLLM 0.24 and 0.33 (`tools/check_vllm`). See docs/vllm.md.
"""
