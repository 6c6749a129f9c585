"""The rules of the house, read from the source: who imports whom, and who touches private names of torch and triton."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from limits import HANGS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aot_cache"

# Arrows point down: a module imports what stands on an earlier line, and its own room; for types alone, anything.
LAYERS = (
    ("errors", "tested", "process_group"),
    ("files",),
    ("store",),
    ("recipes",),
    ("artifact",),
    ("remote",),
    ("upstream",),
    ("upstream.codec",),
    ("upstream.hooks",),
    ("upstream.virtual",),
    ("misses",),
    ("recordings",),
    ("builder", "runtime"),
    ("tuning", "rehearsal"),
    ("cli.facts",),
    ("cli.render",),
    ("cli",),
    ("engines.tensorrt_llm",),  # which `auto` activates: that engine has no place for plug-ins
    ("", "__main__", "auto", "models"),  # "" is aot_cache/__init__.py
    ("engines",),
)

# What imports no torch and no Triton: finding that there is nothing to do takes milliseconds, not seconds.
LIGHT = ("aot_cache", "aot_cache.auto", "aot_cache.cli.main", "aot_cache.builder.pipeline", "aot_cache.runtime.loader")

# Rooms without an underscore in their name that have no promise of staying as they are, either: Triton's, but for
# `triton` and `triton.language`, and the symbolic shapes and proxies under torch.fx.
INSIDE = ("triton.runtime", "triton.compiler", "triton.backends", "triton.knobs", "torch.fx.experimental")

# torch's rooms that compile, by the name that each is private under: the check of private names must know them all.
TORCH_INSIDE = (
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch",
    "torch._guards",
    "torch._subclasses",
    "torch._C",
    "torch.fx.experimental",
)

# Names of attributes that only upstream's objects have, whatever the variable is called.
UPSTREAM_ATTRIBUTES = frozenset(
    # Triton's kernels and autotuners
    {"device_caches", "metadata_group", "packed_metadata", "pre_run_hooks", "prune_configs", "used_global_vals"}
    # Dynamo's frames, guards and backends
    | {"guarded_code", "skip_reason", "frame_exec_strategy", "verbose_code_parts", "global_state_guard"}
    | {"_torchdynamo_orig_backend", "_torchdynamo_orig_callable", "_torchdynamo_inline", "_backend_id"}
    # tensors without memory, and sizes that are not known
    | {"shape_env", "fake_mode", "untyped_storage", "_dynamo_dynamic_indices", "_is_param"}
)

# Each a debt with its reason; a strict xfail, so that paying it makes the entry fail and go.
KNOWN_BREACHES: dict[str, str] = {}


@dataclass(frozen=True)
class Import:
    """One imported module, or one name out of a module."""

    module: str
    name: str  # "" for `import module`
    line: int
    when: str  # "module", "function" or "types" (under TYPE_CHECKING)

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(), str(FILES[module]))


@cache
def imports(module: str) -> tuple[Import, ...]:
    return tuple(_imports(tree(module).body, module, "module"))


def _imports(body: list[ast.stmt], module: str, when: str) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, "", node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module)
            yield from (Import(base, alias.name, node.lineno, when) for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _imports(node.body, module, "function" if when == "module" else when)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.body, module, "types")
            yield from _imports(node.orelse, module, when)
        else:
            for inner in ast.iter_child_nodes(node):
                if isinstance(inner, (ast.ExceptHandler, ast.match_case)):
                    yield from _imports(inner.body, module, when)
            blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
            yield from _imports([s for b in blocks if isinstance(b, list) for s in b], module, when)


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if FILES[module].name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def own_imports(module: str) -> Iterator[tuple[str, Import]]:
    """The modules of this package that `module` imports."""
    for item in imports(module):
        if item.dotted in FILES:
            yield item.dotted, item
        elif item.module in FILES:
            yield item.module, item


ROOMS = {name for layer in LAYERS for name in layer}


def room(module: str) -> str:
    """`aot_cache.builder.kernels_trace` → `builder`, `aot_cache.upstream.codec.triton_jit` → `upstream.codec`."""
    first, _, rest = module.partition(".")[2].partition(".")
    inner = f"{first}.{rest.partition('.')[0]}"
    return inner if inner in ROOMS else first


def level(module: str) -> int:
    found = [number for number, rooms in enumerate(LAYERS) if room(module) in rooms]
    assert found, f"{module} stands in no layer: add its room to LAYERS in {Path(__file__).name}"
    return found[0]


def at(module: str, line: int) -> str:
    return f"{FILES[module].relative_to(ROOT)}:{line}"


# --- rooms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", FILES)
def test_arrows_point_down(module: str) -> None:
    wrong = [
        f"{at(module, item.line)}: {module} imports {other}"
        for other, item in own_imports(module)
        if item.when != "types" and room(other) != room(module) and level(other) >= level(module)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("wing", "other"),
    [("builder", "runtime"), ("runtime", "builder"), ("rehearsal", "builder"), ("runtime", "upstream.virtual")],
)
def test_the_wings_do_not_know_each_other(wing: str, other: str) -> None:
    wrong = [
        at(module, item.line)
        for module in FILES
        if room(module) == wing
        for imported, item in own_imports(module)
        if room(imported) == other
    ]
    assert not wrong, f"{wing}/ imports {other}/; they meet in artifact/ and store/ only: {wrong}"


def test_what_is_elsewhere_is_asked_by_builders_and_commands_only() -> None:
    """A serving process asks nobody; a build asks for what others have compiled, and for nothing else."""
    users = {(room(m), other) for m in FILES for other, _ in own_imports(m) if room(other) == "remote" != room(m)}
    assert {user for user, _ in users} == {"builder", "cli"}
    assert {other for user, other in users if user == "builder"} == {"aot_cache.remote.shared_store"}
    assert {other for user, other in users if user == "cli"} == {"aot_cache.remote.push", "aot_cache.remote.pull"}


def test_the_store_knows_errors_only() -> None:
    for module in (m for m in FILES if room(m) == "store"):
        for item in imports(module):
            top = item.module.partition(".")[0]
            assert top not in ("torch", "triton"), f"{at(module, item.line)}: the store imports {item.dotted}"
            assert top != "aot_cache" or item.module.startswith(
                ("aot_cache.store", "aot_cache.files", "aot_cache.errors")
            ), f"{at(module, item.line)}: the store imports {item.dotted}"


def test_only_hooks_patch() -> None:
    """What lasts in a serving process is in one folder, and goes through `upstream.patch`."""
    users = {module for module in FILES for other, _ in own_imports(module) if other == "aot_cache.upstream.patch"}
    assert {room(module) for module in users} == {"upstream.hooks", "runtime"}  # runtime: `stats()` lists what is in


def no_circle(graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_no_circles() -> None:
    no_circle(
        {
            module: {other for other, item in own_imports(module) if item.when == "module" and other != module}
            for module in FILES
        }
    )


# --- tools and examples: modules of folders that are on the path, so they import each other by bare names --------------


def beside(folder: str) -> dict[str, Path]:
    """Module → file of a folder beside the package, scripts without an ending included."""
    files = [path for path in sorted((ROOT / folder).rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    python = [p for p in files if p.suffix == ".py" or (not p.suffix and "python" in p.read_text().partition("\n")[0])]
    assert len({path.stem for path in python}) == len(python), f"two modules of {folder}/ have one name"
    return {path.stem: path for path in python}


def all_imports(path: Path) -> set[str]:
    """The first names of everything that a file imports, in functions, too: `a` of `from a.b import c`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


TOOLS, EXAMPLES = beside("tools"), beside("examples")


def test_no_circle_in_tools_and_examples() -> None:
    assert "harness" in TOOLS and "serve" in EXAMPLES
    files = {**TOOLS, **EXAMPLES}
    no_circle({module: (all_imports(path) & set(files)) - {module} for module, path in files.items()})


def test_examples_need_no_tool_and_tools_no_example() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {', '.join(found)}"
        for mine, others in ((EXAMPLES, TOOLS), (TOOLS, EXAMPLES))
        for path in mine.values()
        if (found := all_imports(path) & {*others, "tools", "examples", "tests"})
    ]
    assert not wrong, "\n".join(wrong)


def test_workloads_are_at_the_bottom() -> None:
    """Recipes are imported by processes that build, which know nothing of who started them."""
    for module, path in TOOLS.items():
        if path.parent.name == "workloads":
            others = [name for name in all_imports(path) & set(TOOLS) if TOOLS[name].parent != path.parent]
            assert not others, f"{module} imports {others}"


def test_a_bare_name_is_one_module() -> None:
    """Tests have all these folders on their path: a name that two have, or Python itself, would be the wrong one in one."""
    names = [
        *TOOLS,
        *EXAMPLES,
        *(
            path.stem
            for path in (ROOT / "tests").rglob("*.py")
            if not {"conftest.py", "fake_vllm", "fake_sglang", "fake_tensorrt_llm"} & {*path.parts}
        ),
    ]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice and not set(names) & sys.stdlib_module_names


# --- private names of torch and triton --------------------------------------------------------------------------------


def is_private(dotted: str) -> bool:
    """Whether this name of torch or triton has no promise of staying as it is."""
    parts = dotted.split(".")
    if parts[0] not in ("torch", "triton"):
        return False
    if any(part.startswith("_") and not part.endswith("__") for part in parts):
        return True
    return any(dotted == inside or dotted.startswith(f"{inside}.") for inside in INSIDE)


def private_uses(module: str) -> Iterator[tuple[int, str]]:
    """(line, name) of each private name of torch or triton that `module` touches, as far as the source tells."""
    bound = {}
    for item in imports(module):
        if is_private(item.dotted):
            yield item.line, item.dotted
        if item.module.partition(".")[0] in ("torch", "triton"):
            top = item.module.partition(".")[0]
            bound[item.name or top] = item.dotted if item.name else top
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                dotted = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
                if alias.asname and dotted.partition(".")[0] in ("torch", "triton"):
                    bound[alias.asname] = dotted
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            root, _, rest = dotted.partition(".")
            if root in bound and is_private(f"{bound[root]}.{rest}"):
                yield node.lineno, f"{bound[root]}.{rest}"
            if node.attr in UPSTREAM_ATTRIBUTES:
                yield node.lineno, dotted
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # importlib.import_module("triton.runtime"), sys.modules["torch._C"], a table of modules to be patched
            if _DOTTED.fullmatch(node.value) and is_private(node.value):
                yield node.lineno, node.value
        elif isinstance(node, ast.Call) and node.args:
            # getattr(torch, "_C")
            words = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            first = bound.get(ast.unparse(node.args[0]), "")
            for word in words:
                if ast.unparse(node.func) in ("getattr", "setattr", "hasattr") and is_private(f"{first}.{word}"):
                    yield node.lineno, f"{first}.{word}"


_DOTTED = re.compile(r"(torch|triton)(\.\w+)+")


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(m, marks=pytest.mark.xfail(reason=KNOWN_BREACHES[m], strict=True) if m in KNOWN_BREACHES else ())
        for m in FILES
        if not room(m).startswith("upstream")
    ],
)
def test_private_names_of_upstream_stay_upstream(module: str) -> None:
    wrong = sorted({f"{at(module, line)}: {name}" for line, name in private_uses(module)})
    assert not wrong, "private names of torch or triton outside of upstream/:\n" + "\n".join(wrong)


@pytest.mark.parametrize("module", [m for m in FILES if room(m) in ("builder", "runtime")])
def test_the_wings_ask_triton_for_its_version_only(module: str) -> None:
    found = {item.dotted for item in imports(module) if item.module.partition(".")[0] == "triton"} - {"triton"}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "triton":
            found.add(f"triton.{node.attr}")
    assert found <= {"triton.__version__"}, f"{module} uses {sorted(found)}; put it into upstream/"


def test_the_check_of_private_names_sees_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text(
        "import importlib\n"
        "import torch\n"
        "import torch._inductor.config as config\n"
        "from torch._dynamo import reset\n"
        "from triton import knobs\n"
        "from triton.runtime.jit import JITFunction\n"
        "def f(kernel):\n"
        "    from torch import _C\n"
        "    torch.cuda._lazy_init()\n"
        "    getattr(torch, '_C')\n"
        "    importlib.import_module('triton.compiler')\n"
        "    return kernel.device_caches, torch.__version__, torch.cuda.is_available()\n"
        "ROOMS = {'torch._inductor.codecache': 'torch._C is said, torch.nn.Linear is public'}\n"
        "from torch.fx.experimental.symbolic_shapes import ShapeEnv as Env\n"
        "import torch.fx.experimental as fx\n"
        "def g(answer, torch_=torch.compile):\n"
        "    return fx.proxy_tensor, Env.frozen, answer.guarded_code, torch.compiler.reset, torch.fx.Graph\n"
        "def h():\n"
        "    'torch._dynamo'\n"
    )
    monkeypatch.setitem(FILES, "sample", path)
    found = {(line, name) for line, name in private_uses("sample")}
    assert {
        (3, "torch._inductor.config"),
        (4, "torch._dynamo.reset"),
        (5, "triton.knobs"),
        (6, "triton.runtime.jit.JITFunction"),
        (8, "torch._C"),
        (9, "torch.cuda._lazy_init"),
        (10, "torch._C"),
        (11, "triton.compiler"),
        (12, "kernel.device_caches"),
        (13, "torch._inductor.codecache"),
        (14, "torch.fx.experimental.symbolic_shapes.ShapeEnv"),
        (15, "torch.fx.experimental"),
        (17, "torch.fx.experimental.proxy_tensor"),
        (17, "torch.fx.experimental.symbolic_shapes.ShapeEnv.frozen"),
        (17, "answer.guarded_code"),
        (19, "torch._dynamo"),
    } == found


@pytest.mark.parametrize("inside", TORCH_INSIDE)
def test_the_rooms_that_compile_are_private(inside: str) -> None:
    assert is_private(inside) and is_private(f"{inside}.anything")
    assert not is_private(inside.partition(".")[0])


# --- what an import costs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [m for m in LIGHT if m in FILES])
def test_a_light_import(module: str) -> None:
    heavy = ("torch", "triton", "fla", "numpy")
    code = f"import sys, {module}; print(*[m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f"import {module} brings {done.stdout.strip()}"
