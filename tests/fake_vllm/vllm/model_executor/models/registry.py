import json
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm import envs

children = 0


@dataclass(frozen=True)
class _ModelInfo:
    architecture: str


@dataclass(frozen=True)
class _LazyRegisteredModel:
    module_name: str
    class_name: str

    @staticmethod
    def _get_cache_dir() -> Path:
        return Path(envs.cache_root()) / "modelinfos"

    def _get_cache_filename(self) -> str:
        return f"{self.module_name}-{self.class_name}.json"

    def _load_modelinfo_from_cache(self, module_hash: str) -> "_ModelInfo | None":
        try:
            found = json.loads((self._get_cache_dir() / self._get_cache_filename()).read_text())
        except OSError:
            return None
        return _ModelInfo(**found["modelinfo"]) if found["hash"] == module_hash else None

    def _save_modelinfo_to_cache(self, mi: _ModelInfo, module_hash: str) -> None:
        self._get_cache_dir().mkdir(parents=True, exist_ok=True)
        path = self._get_cache_dir() / self._get_cache_filename()
        path.write_text(json.dumps({"hash": module_hash, "modelinfo": asdict(mi)}))

    def inspect_model_cls(self, module_hash: str) -> _ModelInfo:
        global children
        known = self._load_modelinfo_from_cache(module_hash)
        if known is None:
            children += 1
            known = _ModelInfo(self.class_name)
            self._save_modelinfo_to_cache(known, module_hash)
        return known
