"""The invariants of docs/architecture.md, held to the source itself."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qcore

ROOT = Path(__file__).resolve().parents[1]
CORE = sorted((ROOT / "qcore").rglob("*.py"))
PACKAGES = sorted(path for path in ROOT.glob("plugins/*/qcore_*") if path.is_dir())
#: What plugins share is a library: it registers no backend.
LIBRARY_PACKAGE = ROOT / "plugins" / "torch_kernels" / "qcore_torch_kernels"
LIBRARY = sorted(LIBRARY_PACKAGE.rglob("*.py"))
PLUGIN_PACKAGES = [package for package in PACKAGES if package != LIBRARY_PACKAGE]
PLUGINS = sorted(path for package in PLUGIN_PACKAGES for path in package.rglob("*.py"))
#: The only files that may name torch's quantized dtypes, the functions that make such tensors, or its native kernels.
NATIVE = {
    *(package / "kernels.py" for package in PLUGIN_PACKAGES),
    *(LIBRARY_PACKAGE / name for name in ("shells.py", "engines.py", "elementwise.py", "weighted.py", "testing.py")),
}


def imports(path):
    """Every module that a file imports, absolute names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def attribute_chains(path):
    """Every dotted name that a file reads, such as ``torch.ops.quantized.add``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_the_core_names_no_backend(path):
    found = re.findall(r"fbgemm|qnnpack|onednn|\bx86\b", path.read_text(), re.IGNORECASE)
    assert not found


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_the_core_imports_no_plugin(path):
    assert not [name for name in imports(path) if name.startswith("qcore_")]


@pytest.mark.parametrize("path", [*CORE, *LIBRARY, *PLUGINS], ids=relative)
def test_nothing_imports_torch_ao(path):
    banned = re.compile(r"torch\.(ao|quantization)(\.|$)")
    assert not [name for name in (*imports(path), *attribute_chains(path)) if banned.match(name)]


@pytest.mark.parametrize("path", [path for path in (*CORE, *LIBRARY, *PLUGINS) if path not in NATIVE], ids=relative)
def test_quantized_dtypes_and_kernels_stay_where_they_belong(path):
    banned = re.compile(
        r"torch\.(q(u)?int\d+\w*|quantize_per_\w+|_make_per_\w+|_empty_affine_quantized|ops\.(quantized|onednn)|"
        r"backends\.quantized\.engine)(\.|$)"
    )
    assert not [name for name in attribute_chains(path) if banned.match(name)]


def test_a_plugin_has_the_rooms_of_the_house():
    assert PLUGIN_PACKAGES
    for package in PLUGIN_PACKAGES:
        rooms = {path.name for path in package.iterdir()}
        wanted = {
            "plugin.py",
            "backend_config.py",
            "fusion.py",
            "observers.py",
            "lowering.py",
            "kernels.py",
            "py.typed",
        }
        assert wanted <= rooms, package


def test_the_library_is_no_plugin_and_knows_none():
    rooms = {path.name for path in LIBRARY_PACKAGE.iterdir()}
    assert "plugin.py" not in rooms and "py.typed" in rooms
    assert "entry-points" not in (LIBRARY_PACKAGE.parent / "pyproject.toml").read_text()
    plugins = tuple(package.name for package in PLUGIN_PACKAGES)
    for path in LIBRARY:
        assert not [name for name in imports(path) if name.startswith(plugins)], relative(path)


def test_plugins_use_only_what_a_third_party_can():
    """No private module and no private name of the core or the library."""
    for path in (*LIBRARY, *PLUGINS):
        private = [name for name in imports(path) if name.startswith("qcore") and re.search(r"\._", name)]
        assert not private, relative(path)


def code_lines(path):
    """Lines of code: neither blank, nor comment, nor docstring."""
    text = path.read_text()
    documented = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                documented.update(range(value.lineno, value.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        1 for number, line in lines if line.strip() and not line.strip().startswith("#") and number not in documented
    )


def test_modules_are_small():
    assert {relative(path): n for path in (*CORE, *LIBRARY, *PLUGINS) if (n := code_lines(path)) > 400} == {}


def test_the_core_keeps_its_budget():
    """All that a user's program may run; the suite for vendors comes beside it."""
    assert sum(code_lines(path) for path in CORE if "testing" not in path.parts) < 8650


def test_the_plugins_keep_theirs():
    assert sum(map(code_lines, PLUGINS)) < 1140
    assert sum(code_lines(path) for path in LIBRARY if path.name != "testing.py") < 1550


def layer(path):
    """The layers of the core, lowest first; a module imports only from its own layer or a lower one."""
    name = relative(path).removeprefix("qcore/")
    layers = [
        ("errors.py", "_version.py", "table.py", "migration.py"),
        ("dtypes.py", "ops.py"),
        ("observer/",),
        ("qconfig.py", "backend_config.py"),
        ("qconfig_mapping.py",),
        ("quantization_plan.py",),
        ("fx/",),
        ("lowering/", "calibration.py"),
        ("plugins/",),
        ("arguments.py", "quantize_fx.py"),
        ("__init__.py", "testing/"),
    ]
    return next(number for number, names in enumerate(layers) if any(name.startswith(n) for n in names))


def test_imports_point_one_way():
    by_module = {relative(p).removesuffix(".py").replace("/", ".").removesuffix(".__init__"): p for p in CORE}
    for path in CORE:
        for name in imports(path):
            target = by_module.get(name)
            if target is not None and name != "qcore":
                assert layer(target) <= layer(path), f"{relative(path)} imports {name}"


def test_importing_the_core_loads_no_plugin():
    script = "import sys, qcore; print([m for m in sys.modules if m.startswith(('qcore_', 'torch.ao.quantization'))])"
    listed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    before = subprocess.run(
        [sys.executable, "-c", script.replace(", qcore", ", torch")], capture_output=True, text=True, check=True
    ).stdout
    assert listed == before


def test_listing_backends_imports_none():
    script = (
        "import sys, qcore; n = [b.name for b in qcore.installed_backends()]; "
        "assert 'reference' in n; print([m for m in sys.modules if m.startswith('qcore_')])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_public_surface_is_sorted_and_complete():
    assert qcore.__all__ == sorted(qcore.__all__)
    for name in qcore.__all__:
        assert getattr(qcore, name) is not None
    modules = {
        "arguments",
        "backend_config",
        "calibration",
        "dtypes",
        "errors",
        "fx",
        "lowering",
    }
    modules |= {"observer", "ops", "plugins", "qconfig", "qconfig_mapping", "quantization_plan", "quantize_fx"}
    modules |= {"migration", "table", "testing"}
    public = {name for name in vars(qcore) if not name.startswith("_")}
    assert public - modules == set(qcore.__all__) - {"__version__"}


@pytest.mark.parametrize(
    "module", ["quantize_fx", "qconfig", "qconfig_mapping", "backend_config", "observer", "fx.custom_config"]
)
def test_the_module_paths_that_migration_by_find_and_replace_needs(module):
    assert importlib.import_module(f"qcore.{module}")


def test_each_pass_is_followed_by_its_check(monkeypatch):
    import torch

    from qcore.fx import convert, prepare, verify

    order = []

    def record(owner, name):
        function = getattr(owner, name)

        def recorded(*args, **kwargs):
            result = function(*args, **kwargs)
            order.append(name)
            return result

        monkeypatch.setattr(owner, name, recorded)

    passes = (
        (prepare, "check_traced"), (verify, "expand"), (verify, "apply_patterns"), (verify, "check_rewritten"),
        (prepare, "make_plan"), (prepare, "check_planned"), (prepare, "observe"), (prepare, "check_observed"),
        (convert._Conversion, "run"), (convert, "check_reference"),
    )  # fmt: skip
    for owner, name in passes:
        record(owner, name)
    x = torch.randn(2, 3)
    mapping = qcore.get_default_qconfig_mapping("reference")
    prepared = qcore.prepare_fx(torch.nn.Sequential(torch.nn.Linear(3, 3)).eval(), mapping, (x,), backend="reference")
    qcore.calibrate(prepared, [x])
    qcore.convert_fx(prepared)
    assert order == [name for _, name in passes]
    assert {name for name in vars(verify) if name.startswith("check_")} <= set(order)


def test_lowering_matches_nothing():
    """It walks the plan's decisions, and looks a rule up by their operators."""
    for path in (path for path in CORE if "lowering" in path.parts):
        assert not [name for name in imports(path) if name.startswith("qcore.fx.match")], relative(path)
        assert "rpartition" not in path.read_text() or path.name in ("assemble.py", "engine.py"), relative(path)


def test_there_is_one_record_a_stage_and_nothing_beside_it():
    """On each graph and on a host that stays Python, whole or in parts; no attribute holds a plan but the record."""
    import torch

    from qcore.fx.record import RECORD, Record, records
    from qcore.quantization_plan import QuantizationPlan

    class Host(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = (torch.nn.Sequential(torch.nn.Linear(3, 3)) for _ in range(2))

        def forward(self, x):
            one, other = self.one(x), self.other(x)
            return one if x.sum() > 0 else other

    x = torch.randn(2, 3)
    mapping = qcore.get_default_qconfig_mapping("reference")
    falling_back = qcore.PrepareCustomConfig().set_guard_failure("float")
    for build, custom, paths in (
        (lambda: torch.nn.Sequential(torch.nn.Linear(3, 3)), None, [""]),
        (Host, None, ["", "one", "other"]),
        (Host, falling_back, ["", "one", "other"]),
    ):
        prepared = qcore.prepare_fx(build().eval(), mapping, (x,), custom, backend="reference")
        qcore.calibrate(prepared, [x])
        stages = {"prepared": prepared, "reference": qcore.convert_to_reference_fx(prepared)}
        for stage, model in stages.items():
            found = records(model)
            assert list(found) == paths
            assert {record.stage for record in found.values()} == {stage}
            assert len({id(record.settings) for record in found.values()}) == 1
            for module in model.modules():
                for name, value in vars(module).items():
                    assert name == RECORD or not isinstance(value, (Record, QuantizationPlan))
        for record in records(stages["reference"]).values():
            assert not record.plan.observers and not record.plan.notes  # No pass writes into the plan.


#: The rooms whose tests stand in a room of the same name, a file for each module.
MIRRORED = [
    path
    for path in CORE
    if path.parent.name in ("fx", "observer", "lowering", "plugins") and path.name != "__init__.py"
]


@pytest.mark.parametrize("path", MIRRORED, ids=relative)
def test_the_tests_mirror_the_rooms(path):
    mirrored = ROOT / "tests" / path.parent.name / f"test_{path.name}"
    assert mirrored.is_file(), f"{relative(path)} has no {relative(mirrored)}"
    assert re.search(r"^\s*def test_|^class Test", mirrored.read_text(), re.MULTILINE), relative(mirrored)


def test_and_no_test_stands_in_a_room_whose_module_is_gone():
    """A module that is renamed takes its tests along; what crosses modules stands outside of the rooms."""
    modules = {(path.parent.name, path.name) for path in MIRRORED}
    rooms = {room for room, _ in modules}
    tests = [path for room in rooms for path in (ROOT / "tests" / room).glob("test_*.py")]
    assert [
        relative(path) for path in tests if (path.parent.name, path.name.removeprefix("test_")) not in modules
    ] == []
