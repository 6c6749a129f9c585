import os
from dataclasses import dataclass, field


@dataclass
class CompilationConfig:
    level: int = 3
    cache_dir: str = ""

    def compute_hash(self) -> str:
        from vllm.config.utils import get_hash_factors, hash_factors

        return hash_factors(get_hash_factors(self, {"cache_dir"}))


@dataclass
class VllmConfig:
    compilation_config: CompilationConfig = field(default_factory=CompilationConfig)

    @classmethod
    def here(cls) -> "VllmConfig":
        return cls(CompilationConfig(level=int(os.environ.get("FAKE_LEVEL", "3"))))

    def compute_hash(self) -> str:
        return self.compilation_config.compute_hash()[:10]
