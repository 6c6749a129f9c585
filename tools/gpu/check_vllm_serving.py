#!/usr/bin/env python3
"""Serve with an unmodified vLLM on a real GPU, without and with our bundle, and print one JSON record.

    python tools/gpu/check_vllm_serving.py --folder FOLDER [--rows cold,record,build,bundle,…] [--limit SECONDS] [--out FILE]

Each row is a start of vLLM in a fresh process, and the same requests. Rows of earlier calls stay in FOLDER/record.json, so that a
series may take several calls (without a row, `--rows ''`, what is there is judged again). What happened is counted by
`jit_trace`, which has no code of aot-cache in it, and beside it by the workers' ledgers. Exit code 0 when every claim holds for
the rows that there are.

| row | what |
|---|---|
| cold | empty caches, nothing of ours |
| warm, warm2 | the caches of `cold` (of `record`, if there was no `cold`), nothing of ours |
| record | empty caches, under `aot-cache record --candidates chosen` |
| build | `aot-cache build` of what was recorded, with no GPU visible |
| bundle | empty caches, the bundle, no C compiler |
| engine-build | `aot-cache build --engine vllm` of the same command line, with no GPU visible: nothing recorded goes into it |
| engine | empty caches, that bundle, no C compiler |
| memory | the same with less memory for the KV cache: another number of blocks |
| steady, bundle-steady, … | long answers only, in turn without and with the bundle |
| observe, error | with the bundle: nothing is prevented; each miss raises |
| nodraft, nodraft-record, nodraft-build, nodraft-bundle | without drafts: vLLM alone, recorded, built, served |
| ranks-record, ranks-build, ranks-bundle | the model split over `--ranks` GPUs: the same, served with policy `error` |
| ranks | the same model, with the caches of `ranks-record`, if there was one, and nothing of ours |
| ranks-engine-build, ranks-engine | the model split over `--ranks` GPUs: what `engine-build` and `engine` do |
| lacking | policy `error`, a bundle without one kernel: `CacheMiss` must be raised |
| other | the bundle, another limit of sequences: vLLM serves, and the log names what differs |
| killed | recorded, killed with SIGKILL as soon as it is ready: the plan has what was launched |
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import NO_COMPILER, PATH, cli, commit, finish, machine, without_ours

from aot_cache.artifact import engine_cache
from aot_cache.artifact.plan import Plan, Unit
from aot_cache.artifact.specialization import parameter_names
from aot_cache.cli.facts import files as file_facts
from aot_cache.engines.vllm.plugin import AT_START
from aot_cache.runtime import stats_files

HERE = Path(__file__).resolve().parent
Json = Any
SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "language_model_only": True,
    "max_model_len": 4096,
    "dtype": "bfloat16",
    "gdn_prefill_backend": "triton",
    "max_num_seqs": 64,
    "gpu_memory_utilization": 0.5,
    "disable_log_stats": True,
    "seed": 0,
    "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"},
}
START: dict[str, Any] = {"settings": SETTINGS, "drafts": 2, "short": False, "windows": 0}
VARIANTS = ("nodraft", "ranks")
"""Beginnings of the names of rows whose model or options are others."""
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "JIT_TRACE_WEIGHTS": "0.05",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # torch's symmetric memory may use NVLink multicast, which a shared host may not allow
}
COUNTED = ("jit", "compile", "disk hit", "inductor compile", "benchmark", "inductor benchmark", "module load", "load")
COUNTED += ("inductor load", "gcc", "frame", "graph compile", "model load", "model missing", "capture")
NEVER = ("compile", "inductor compile", "benchmark", "inductor benchmark", "gcc", "frame", "graph compile")
"""What must not happen in a capture, or when vLLM is ready. A `disk hit` is covered by `load` and `module load`."""
LOADS = ("module load", "load", "inductor load")
NEEDS = {"cold": 260, "record": 300, "build": 110, "engine-build": 200}
"""Seconds that a row may take, by its name without the variant; 120 for others. A row is not begun when less is left."""
OURS = "aot_cache.errors."
LACKS = "_causal_conv1d_update_kernel"


class Series:
    """The rows of one folder.

    Args:
        folder: caches, plans, bundles and logs.
        until: time after which no row is begun that needs longer.
        ranks: how many GPUs the rows `ranks-…` use.
    """

    def __init__(self, folder: Path, until: float, ranks: int) -> None:
        self.folder, self.until, self.ranks = folder, until, ranks
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "record.json"
        self.rows: dict[str, Json] = self._kept()
        self.bundle, self.plan = folder / "bundle.safetensors", folder / "server.plan.json"

    def _kept(self) -> dict[str, Json]:
        return json.loads(self.file.read_text())["rows"] if self.file.exists() else {}

    def machine(self) -> Json:
        """Where the rows ran."""
        return json.loads(self.file.read_text())["machine"] if self.file.exists() else machine()

    def compare(self) -> None:
        """Say of the rows `engine-build` and `ranks-engine-build` what only the recording has, and what only the build."""
        recordings = {"engine": self.plan, "ranks-engine": self.folder / "ranks.plan.json"}
        for name, recorded in recordings.items():
            built, plan = self.rows.get(f"{name}-build", {}), self.folder / f"{name}.plan.json"
            if recorded.exists() and plan.exists() and "units" in built:
                built["recorded and not built"] = not_built(recorded, plan)
                more = Counter(json.loads(text)[0].rpartition(":")[2] for text in not_built(plan, recorded))
                built["built and not recorded"] = dict(sorted(more.items()))

    def run(self, name: str) -> None:
        """Run a row, and keep its answer."""
        if time.time() + NEEDS.get(_variant(name)[1], 120) > self.until:
            print(f"{name}: not begun, the time is over", file=sys.stderr)
            return
        began = time.time()
        try:
            self.rows[name] = self._row(name)
        except Exception as error:
            self.rows[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        self.rows[name]["row seconds"] = round(time.time() - began, 1)
        self.rows = {**self._kept(), name: self.rows[name]}  # another call may have added rows meanwhile
        self.rows[name]["commit"] = commit()
        self.file.write_text(json.dumps({"rows": self.rows, "machine": machine()}))
        print(
            name,
            json.dumps({k: v for k, v in self.rows[name].items() if k != "tokens"})[:1500],
            file=sys.stderr,
            flush=True,
        )

    def _row(self, name: str) -> Json:
        ours = {"AOT_CACHE": str(self.bundle), **NO_COMPILER}
        variant, step = _variant(name)
        if variant == "ranks":
            return {"gpus": self.ranks, **self._row_of_variant(name, variant, step)}
        if variant:
            return self._row_of_variant(name, variant, step)
        if name == "build":
            return self._build(self.plan, self.bundle)
        if name == "engine-build":
            return self._engine_build(name, "engine", served(2))
        if name == "engine":
            return self._start(name, name, windows=1, **{**ours, "AOT_CACHE": str(self.folder / "engine.safetensors")})
        if name in ("cold", "warm", "warm2"):
            return self._start(name, "of cold" if name == "cold" else self._filled(), windows=1)
        if name == "record":
            return self._record(name, "of record", self.plan)
        if name in ("bundle", "bundle2"):
            return self._start(name, name, windows=1, **ours)
        if name == "memory":
            return self._start(name, name, settings={**SETTINGS, "gpu_memory_utilization": 0.43}, **ours)
        if name == "observe":
            return self._start(name, name, short=True, AOT_CACHE_POLICY="observe", **ours)
        if name == "error":
            return self._start(name, name, AOT_CACHE_POLICY="error", **ours)
        if name.startswith("steady"):
            return self._start(name, self._filled(), short=True, windows=4)
        if name.startswith("bundle-steady"):
            return self._start(name, name, short=True, windows=4, **ours)
        if name == "lacking":
            return self._lacking(ours)
        if name == "other":
            return self._start(name, name, short=True, settings={**SETTINGS, "max_num_seqs": 32}, **ours)
        if name == "killed":
            return self._killed()
        raise SystemExit(f"no row {name}")

    def _row_of_variant(self, name: str, variant: str, step: str) -> Json:
        plan, bundle = self.folder / f"{variant}.plan.json", self.folder / f"{variant}.safetensors"
        ours = {"AOT_CACHE": str(bundle), **NO_COMPILER}
        options: Json = {"drafts": 0}
        if variant == "ranks":
            options, ours["AOT_CACHE_POLICY"] = {"settings": self._split()}, "error"
        recorded = f"of {variant} record"
        if step == "":
            has_caches = (self.folder / "caches" / recorded).exists()
            return self._start(name, recorded if has_caches else f"of {variant}", **options)
        if step == "record":
            return self._record(name, recorded, plan, **options)
        if step == "build":
            return self._build(plan, bundle)
        if step == "bundle":
            return self._start(name, name, **options, **ours)
        if name == "ranks-engine-build":
            return self._engine_build(name, "ranks-engine", served(2, self._split()))
        if name == "ranks-engine":
            return self._start(
                name, name, **options, **{**ours, "AOT_CACHE": str(self.folder / "ranks-engine.safetensors")}
            )
        raise SystemExit(f"no row {name}")

    def _split(self) -> Json:
        """Settings of the rows `ranks-…`. With `--ranks 1` the only worker is in a process of its own, too."""
        return {**SETTINGS, "tensor_parallel_size": self.ranks, "distributed_executor_backend": "mp"}

    def _record(self, name: str, caches: str, plan: Path, **options: Any) -> Json:
        return {
            **self._start(name, caches, [*_recording(plan), "--candidates", "chosen"], **options),
            **_planned(plan),
        }

    def _engine_build(self, name: str, bundle: str, options: Sequence[str]) -> Json:
        """The bundle of the command line alone."""
        out = self.folder / f"{bundle}.safetensors"
        target = next(name for name in ("h100", "h200") if name.upper() in machine()["gpu"])
        asked = ["build", "--engine", "vllm", "--target", target, "--store", str(self.folder / f"{bundle}-store")]
        model = write_model(self.folder / "model")
        done = cli(*asked, "--out", str(out), "--json", "--", str(model), *options, CUDA_VISIBLE_DEVICES="", **OFFLINE)
        log = self.folder / "out" / name / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(done.stderr)
        if done.returncode:
            return {"error": done.stderr.splitlines()[-20:]}
        (built,) = json.loads(done.stdout)["bundles"]
        return {name: built[name] for name in ("units", "graphs", "size", "failed", "seconds", "engine")}

    def _filled(self) -> str:
        """Caches that vLLM itself has filled."""
        return "of cold" if (self.folder / "caches" / "of cold").exists() else "of record"

    def _start(self, name: str, caches: str, prefix: Sequence[str] = (), /, **more: Any) -> Json:
        """One start of vLLM, and what it did. Names in capitals are variables of the environment, others options of the start."""
        variables = {key: value for key, value in more.items() if key.isupper()}
        out, began = self._begin(name, caches, prefix, variables, {k: v for k, v in more.items() if not k.isupper()})
        try:
            code = began.wait(timeout=420)
        except subprocess.TimeoutExpired:
            os.killpg(began.pid, signal.SIGKILL)
            code = -9
        text = (out / "log.txt").read_text(errors="replace")
        said = [line[-700:] for line in text.splitlines() if "] aot-cache" in line or line.startswith("aot-cache")][:8]
        answer = out / "answer.json"
        if not answer.exists():
            return {"code": code, "error": text.splitlines()[-25:], "raised": raised(text), "said": said}
        return {**_summary(json.loads(answer.read_text()), out), "code": code, "said": said}

    def _begin(
        self, name: str, caches: str, prefix: Sequence[str], variables: Mapping[str, str], options: Json
    ) -> tuple[Path, subprocess.Popen[bytes]]:
        """(folder of a row's files, the process, in a group of its own)."""
        out = self.folder / "out" / name
        shutil.rmtree(out, ignore_errors=True)
        environment = self._environment(out, caches, variables)
        own = {
            "model": str(write_model(self.folder / "model")),
            "began": time.time(),
            "answer": str(out / "answer.json"),
        }
        (out / "options.json").write_text(json.dumps({**START, **options, **own}))
        command = [*prefix, "--"] if prefix else []
        command += [sys.executable, str(HERE / "vllm_start.py"), str(out / "options.json")]
        with open(out / "log.txt", "w") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return out, process

    def _environment(self, out: Path, caches: str, variables: Mapping[str, str]) -> dict[str, str]:
        home = self.folder / "caches" / caches
        for folder in (home, out / "trace", out / "stats", home / "tmp"):
            folder.mkdir(parents=True, exist_ok=True)
        own = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "JIT_TRACE": str(out / "trace")}
        found = {**without_ours(), **OFFLINE, **own}
        found["PYTHONPATH"] = os.pathsep.join([str(HERE / "jit_trace"), PATH])
        if "AOT_CACHE" in variables:
            found |= {"AOT_CACHE_STATS": str(out / "stats"), "AOT_CACHE_MISSES": str(out / "misses.jsonl")}
        return {**found, **variables}

    def _build(self, plan: Path, out: Path) -> Json:
        target = json.loads(plan.read_text())["target"]
        asked = ["build", "--plan", str(plan), "--model", "vllm-steps", "--option", "vocab_size=32000"]
        asked += ["--option", f"max_num_seqs={SETTINGS['max_num_seqs']}"]
        asked += ["--at-start", "num_cache_lines", "--target", target, "--store", str(self.folder / "store")]
        done = cli(*asked, "--out", str(out), "--json", CUDA_VISIBLE_DEVICES="")
        if done.returncode:
            return {"error": done.stderr.splitlines()[-20:]}
        (built,) = json.loads(done.stdout)["bundles"]
        return {name: built[name] for name in ("units", "graphs", "size", "failed", "seconds", "untested")}

    def _lacking(self, ours: Mapping[str, str]) -> Json:
        """The bundle without one kernel. A graph of vLLM's captures cannot do without it."""
        plan, out = self.folder / "lacking.plan.json", self.folder / "lacking.safetensors"
        lines = [line for line in self.plan.read_text().splitlines() if f":{LACKS}" not in line or '"closures"' in line]
        plan.write_text("\n".join(lines).replace(",\n]", "\n]") + "\n")
        if engine_cache.beside(self.plan).exists():
            shutil.copy(engine_cache.beside(self.plan), engine_cache.beside(plan))
        built = self._build(plan, out)
        if "error" in built:
            return built
        return {
            **self._start("lacking", "lacking", **{**ours, "AOT_CACHE": str(out), "AOT_CACHE_POLICY": "error"}),
            "built": built,
        }

    def _killed(self) -> Json:
        """Recorded, and all of its processes but the recorder killed when it is ready."""
        plan = self.folder / "killed.plan.json"
        out, process = self._begin("killed", "of record", _recording(plan), {}, {})
        ready = _wait_for(process, out / "trace", "capture_model", 200)
        engines = [int(path.stem) for path in (out / "trace").glob("*.jsonl") if path.stem != str(process.pid)]
        for pid in engines:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code = process.wait(timeout=60)
        return {"code": code, "was ready": ready, "killed": len(engines), **_planned(plan)}


def served(drafts: int, settings: Json = SETTINGS) -> list[str]:
    """Settings as options of `vllm serve`. Class `LLM` has a default of its own for the tokens of a step."""
    out = ["--max-num-batched-tokens", "16384"]
    settings = dict(settings)
    if drafts:
        settings["speculative_config"] = {"method": "mtp", "num_speculative_tokens": drafts}
    for name, value in settings.items():
        if name in ("load_format", "skip_tokenizer_init", "disable_log_stats"):
            continue
        option = f"--{name.replace('_', '-')}"
        out += [option] if value is True else [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    return out


def not_built(recorded: Path, built: Path) -> list[str]:
    """Specializations of a plan or bundle that another does not have, constants that are known only at start aside."""
    there, here = ({_text(unit, plan) for unit in plan.units} for plan in map(_plan_in, (recorded, built)))
    return sorted(there - here)


def _plan_in(path: Path) -> Plan:
    return file_facts.side(path).plan


def _text(unit: Unit, plan: Plan) -> str:
    names = parameter_names(unit.kernel, plan.closures[unit.kernel])
    pairs = [pair for name, pair in zip(names, unit.specialization, strict=True) if name not in AT_START]
    return json.dumps([unit.kernel.partition("@")[0], pairs, list(unit.options.items())])


def _variant(name: str) -> tuple[str, str]:
    """(variant, the rest) of a row's name: `ranks-engine-build` → `ranks`, `engine-build`; `bundle` → ``, `bundle`."""
    first, _, rest = name.partition("-")
    return (first, rest) if first in VARIANTS else ("", name)


def raised(log: str) -> list[str]:
    """Errors of ours in a log: how they begin and end."""
    found = {line[line.index(OURS) :] for line in log.splitlines() if OURS in line}
    return [line if len(line) < 700 else f"{line[:350]} … {line[-350:]}" for line in sorted(found)]


def _recording(plan: Path) -> list[str]:
    """`aot-cache record`, to be put before a command."""
    return [sys.executable, "-m", "aot_cache", "record", "--out", str(plan)]


def _wait_for(process: subprocess.Popen[bytes], trace: Path, phase: str, seconds: float) -> bool:
    until = time.time() + seconds
    while time.time() < until and process.poll() is None:
        if any(f'"name": "{phase}"' in path.read_text() for path in trace.glob("*.jsonl")):
            return True
        time.sleep(0.2)
    return False


def _planned(plan: Path) -> Json:
    if not plan.exists():
        return {"plan": None}
    found = json.loads(plan.read_text())
    kernels = sorted({unit["kernel"].rpartition(":")[2] for unit in found["units"]})
    beside = engine_cache.beside(plan)
    size = beside.stat().st_size if beside.exists() else 0
    return {
        "plan": {"units": len(found["units"]), "tunings": len(found["tunings"]), "kernels": kernels, "caches": size}
    }


def _summary(answer: Json, out: Path) -> Json:
    """Seconds, and counts of events: in all, inside captures, and since vLLM was ready. `out` has the row's files."""
    each = [list(map(json.loads, path.read_text().splitlines())) for path in (out / "trace").glob("*.jsonl")]
    events = [event for process in each for event in process]
    ready = answer["ready_at"]
    found = [event for event in events if event["kind"] in COUNTED]
    counts = {
        "all": Counter(event["kind"] for event in found),
        "capturing": Counter(event["kind"] for event in found if event["capturing"]),
        "after ready": Counter(event["kind"] for event in found if event["t"] > ready),
    }
    odd = [event for event in found if event["kind"] in (*NEVER, *LOADS) and (event["capturing"] or event["t"] > ready)]
    tokens = {step["label"]: step.get("tokens") for step in answer["steps"]}
    ledgers = stats_files.read(str(out / "stats")).values()
    keys = ("total", "in_capture", "after_seal")
    return {
        "imported": round(answer["imported"], 2),
        "ready": round(answer["ready"], 2),
        "first token": round(answer["first_token"], 2),
        "done": round(answer["done"], 2),
        "phases": _phases(each),
        "counts": {name: dict(count) for name, count in counts.items()},
        "odd": sorted({f"{e['kind']} {e['name']}{' capturing' if e['capturing'] else ''}" for e in odd})[:40],
        "errors": [step["error"] for step in answer["steps"] if "error" in step][:3],
        "steady": {
            step["label"]: round(step["seconds"], 3) for step in answer["steps"] if step["label"].startswith("steady")
        },
        "ranks": _ranks(each, ready),
        "not hooked": sorted({event["name"] for event in events if event["kind"] == "not hooked"}),
        "ledgers": [{key: {k: v for k, v in one[key].items() if v} for key in keys} for one in ledgers],
        "tokens": tokens,
    }


def _ranks(processes: Sequence[Sequence[Json]], ready: float) -> dict[str, Json]:
    """Rank → how many graphs it has captured, and its counts inside captures and since vLLM was ready."""
    found: dict[str, Json] = {}
    for events in processes:
        rank = next((event["name"] for event in events if event["kind"] == "worker"), None)
        if rank is not None:
            counted = [event for event in events if event["kind"] in COUNTED]
            found[rank] = {
                "captures": sum(event["kind"] == "capture" for event in counted),
                "capturing": dict(Counter(event["kind"] for event in counted if event["capturing"])),
                "after ready": dict(Counter(event["kind"] for event in counted if event["t"] > ready)),
            }
    return dict(sorted(found.items()))


def _phases(processes: Sequence[Sequence[Json]]) -> dict[str, float]:
    """Step of vLLM's or ours → seconds in all, of the process that spent most in it."""
    found: dict[str, float] = {}
    for events in processes:
        here: Counter[str] = Counter()
        for event in events:
            if event["kind"] == "phase":
                here[event["name"]] += event["seconds"]
        found.update({name: round(seconds, 2) for name, seconds in here.items() if seconds > found.get(name, 0.0)})
    return found


def write_model(folder: Path) -> Path:
    """A small Qwen3.5 with one MTP layer: a config.json, no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = 32000
    text = {
        "model_type": "qwen3_5_text",
        "vocab_size": vocabulary,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "dtype": "bfloat16",
        "eos_token_id": vocabulary - 1,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
    }
    vision = {
        "model_type": "qwen3_5",
        "depth": 2,
        "hidden_size": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 512,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 1024,
        "num_position_embeddings": 2304,
        "initializer_range": 0.02,
        "deepstack_visual_indexes": [],
    }
    ends = {name: vocabulary - n for n, name in enumerate(("vision_end_token_id", "vision_start_token_id"), start=7)}
    ends |= {"video_token_id": vocabulary - 9, "image_token_id": vocabulary - 10}
    whole = {"architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps({**whole, **ends, "text_config": text, "vision_config": vision}))
    return folder


# --- claims -----------------------------------------------------------------------------------------------------------


def claims(rows: Mapping[str, Json]) -> dict[str, bool]:
    """What must hold, for the rows that there are."""
    out: dict[str, bool] = {}
    for name in ("bundle", "bundle2", "engine", "memory", "error", "nodraft-bundle", "ranks-bundle", "ranks-engine"):
        row = rows.get(name)
        if row is None:
            continue
        if "counts" not in row:
            out[f"{name}: vLLM started"] = False
            continue
        for when in ("capturing", "after ready"):
            found = row["counts"][when]
            out[f"{name}: nothing compiled or tuned {when}"] = not any(found.get(kind) for kind in NEVER)
            out[f"{name}: nothing loaded {when}"] = not any(found.get(kind) for kind in LOADS)
        out[f"{name}: no request failed"] = not row["errors"]
        if _variant(name)[0] == "ranks":
            out[f"{name}: each rank has captured as much and loaded as much of the bundle"] = _alike(row)
    out |= _tokens_claims(rows)
    for name in ("cold", "warm"):
        if "counts" in rows.get(name, {}):
            counts = rows[name]["counts"]
            out[f"{name}: the trace sees what is compiled or loaded after ready"] = bool(
                sum(counts["after ready"].get(kind, 0) for kind in (*NEVER, *LOADS))
            )
    if "warm" in rows and "bundle" in rows and all("ready" in rows[name] for name in ("warm", "bundle")):
        ours, theirs = rows["bundle"], rows["warm"]
        out["engine init at most 1.25 of vLLM's own warm start"] = _init(ours) <= 1.25 * _init(theirs)
        out["ready at most 1.1 of vLLM's own warm start"] = ours["ready"] <= 1.1 * theirs["ready"]
    for name in ("engine-build", "ranks-engine-build"):
        if "recorded and not built" in rows.get(name, {}):
            out[f"{name}: all that was recorded is built from the command line alone"] = not rows[name][
                "recorded and not built"
            ]
    if "lacking" in rows:
        out["a kernel taken out: CacheMiss"] = "CacheMiss" in json.dumps(rows["lacking"])
    if "other" in rows:
        out["another option: named, and served"] = not rows["other"].get("errors", [1]) and any(
            "vLLM compiles" in line for line in rows["other"].get("said", [])
        )
    if "killed" in rows:
        out["killed while recording: the plan has kernels"] = bool((rows["killed"].get("plan") or {}).get("units"))
    return out


def _alike(row: Json) -> bool:
    captures = {rank["captures"] for rank in row["ranks"].values()}
    loaded = {(one["total"].get("installed"), one["total"].get("primed")) for one in row["ledgers"]}
    return len(captures) == len(loaded) == 1 and len(row["ledgers"]) == len(row["ranks"]) == row["gpus"]


def _init(row: Json) -> float:
    return float(row["phases"].get("__init__", 0.0))


OTHER_KERNELS = ("other", "engine", "ranks-engine")
"""Rows whose kernels are others than the recorded ones: a build that measures nothing has other tiles, which may add
numbers up in another order. Their share of equal tokens is in the record, and is no claim."""
ALONE, BATCHED = ("alone",), ("pass", "mixed")
"""Beginnings of the labels of greedy requests: one at a time, and in batches."""


def tokens_equal(rows: Mapping[str, Json]) -> dict[str, dict[str, float]]:
    """Row → share of the greedy requests with the tokens of the same request in the variant's first row: one at a time, and in
    batches."""
    out: dict[str, dict[str, float]] = {}
    for variant in ("", *VARIANTS):
        found = {n: row["tokens"] for n, row in rows.items() if row.get("tokens") and _variant(n)[0] == variant}
        first = next(iter(found.values()), None)
        for name, tokens in list(found.items())[1:]:
            shares = {"alone": _share(first, tokens, ALONE), "in batches": _share(first, tokens, BATCHED)}
            out[name] = {kind: share for kind, share in shares.items() if share is not None}
    return out


def _share(left: Json, right: Json, labels: tuple[str, ...]) -> float | None:
    both = [label for label in left.keys() & right.keys() if label.startswith(labels) and left[label] and right[label]]
    pairs = [pair for label in both for pair in zip(left[label], right[label])]
    return round(sum(a == b for a, b in pairs) / len(pairs), 4) if pairs else None


def _tokens_claims(rows: Mapping[str, Json]) -> dict[str, bool]:
    out: dict[str, bool] = {}
    equal = tokens_equal(rows)
    alone = {name: shares["alone"] for name, shares in equal.items() if "alone" in shares and name not in OTHER_KERNELS}
    if alone:
        out["tokens of 200 requests, one at a time, equal in all rows"] = set(alone.values()) == {1.0}
        tokens = next(row["tokens"] for row in rows.values() if row.get("tokens"))
        sequences = [sequence for label, step in tokens.items() if label.startswith(ALONE) for sequence in step]
        out["200 of those sequences vary"] = sum(len(set(s)) > len(s) // 3 for s in sequences) >= 200
    if "warm" in equal and "bundle" in equal:  # without us, too, some differ, because batches do
        ours, theirs = (1 - equal[name]["in batches"] for name in ("bundle", "warm"))
        out["tokens in batches differ at most twice as often as between two starts without us"] = ours <= 2 * theirs
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="for caches, bundles, logs, and rows of earlier calls"
    )
    parser.add_argument("--rows", default="cold,warm,record,build,bundle", help="in this order, separated by commas")
    parser.add_argument("--ranks", type=int, default=2, help="number of GPUs of the rows ranks-…")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds in which the call must end")
    parser.add_argument("--out", help="file for the record")
    options = parser.parse_args()
    series = Series(options.folder.absolute(), time.time() + options.limit, options.ranks)
    for name in filter(None, options.rows.split(",")):
        series.run(name)
    series.compare()
    rows = {name: {k: v for k, v in row.items() if k != "tokens"} for name, row in series.rows.items()}
    record = {"what": "an unmodified vLLM, without and with a bundle", "commit": commit(), "machine": series.machine()}
    found = {"rows": rows, "tokens equal to the first row": tokens_equal(series.rows), "claims": claims(series.rows)}
    return finish({**record, **found}, options.out)


if __name__ == "__main__":
    sys.exit(main())
