"""How mergekit learns of ``pcb``: in which processes, in which order of imports, at what cost.

Wheel, editable install, half-removed and broken installations each live in a throw-away
virtual environment that sees this one's packages, but not this one's mergekit-pcb.
"""

import os
import pathlib
import subprocess
import sys
import sysconfig
import textwrap
import venv

import pytest
from conftest import ROOT

import mergekit_pcb

HERE = pathlib.Path(__file__).parent
PRESENT = (
    "import mergekit.merge_methods as m; assert m.get('pcb').spec.pretty_name == 'PCB-Merging'"
)
ABSENT = (
    "import mergekit.merge_methods as m; "
    "assert 'pcb' not in [method.spec.name for method in m.registered_methods()]"
)


def python(code, *, executable=sys.executable, check=True, options=(), **environment):
    result = subprocess.run(
        [str(executable), *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=HERE.anchor,
        env={**os.environ, **environment},
        check=False,
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


ORDERS = {
    "the package": "import mergekit.merge_methods",
    "the registry": "import mergekit.merge_methods.registry",
    "the base classes": "import mergekit.merge_methods.base",
    "the in-memory functions": "from mergekit.merge_methods import merge_tensors",
    "the planner": "import mergekit.plan",
    "run_yaml": "import mergekit.scripts.run_yaml",
    "multimerge": "import mergekit.scripts.multimerge",
    "merge_raw_pytorch": "import mergekit.scripts.merge_raw_pytorch",
    "this package": "import mergekit_pcb",
    "this package's method": "import mergekit_pcb.host.method",
    "this package's class": "from mergekit_pcb import PCBMerge",
    "its parameters": "import mergekit_pcb.host.parameters",
    "torch": "import torch",
}


SLOW = "the planner", "multimerge", "merge_raw_pytorch"


@pytest.mark.parametrize(
    "first", [pytest.param(o, marks=pytest.mark.slow) if o in SLOW else o for o in ORDERS]
)
def test_whichever_module_is_imported_first(first):
    assert python(f"{ORDERS[first]}\n{PRESENT}").stderr == ""


@pytest.mark.slow
def test_the_genome_of_mergekit_evolve_knows_weight_and_density():
    python("""
        from mergekit.evo.genome import METHOD_PARAM_MAPS
        assert METHOD_PARAM_MAPS["pcb"] == ["weight", "density"]
        import sys, mergekit.merge, mergekit.merge_methods, mergekit.scripts.merge_raw_pytorch
        assert not [f for f in sys.meta_path if type(f).__module__.startswith("mergekit_pcb")]
    """)


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_child_processes(tmp_path, method):
    script = tmp_path / "children.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing

        def child(_):
            import mergekit.merge_methods as m
            return m.get("pcb").spec.name

        if __name__ == "__main__":
            with multiprocessing.get_context({method!r}).Pool(1) as pool:
                assert pool.map(child, [0]) == ["pcb"]
        """)
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_python_m_of_the_stock_script(tmp_path, family):
    import yaml
    from checkpoints import configuration

    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(configuration(family[:2])))
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", config, tmp_path / "out"]
    result = subprocess.run(
        [*command, "--no-copy-tokenizer"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_notebooks_that_imported_mergekit_before_the_installation():
    """``import mergekit_pcb`` registers at once when mergekit is there already."""
    python(f"{ABSENT}\nimport mergekit_pcb\n{PRESENT}", options=["-S"], PYTHONPATH=site_packages())


def test_another_finder_that_asks_all_others():
    python("""
        import sys

        class Other:
            def find_spec(self, name, path, target=None):
                if not name.startswith("mergekit."):
                    return None
                for finder in sys.meta_path:
                    if finder is not self and (spec := finder.find_spec(name, path, target)):
                        return spec

        sys.meta_path.insert(0, Other())
        import mergekit.plan
        import mergekit.merge_methods as m
        assert m.get("pcb").spec.pretty_name == "PCB-Merging"
    """)


def test_switched_off():
    python(ABSENT, MERGEKIT_PCB_AUTOLOAD="0")
    python(f"{ABSENT}\nimport mergekit_pcb\n{ABSENT}", MERGEKIT_PCB_AUTOLOAD="0")
    python(f"import mergekit_pcb; mergekit_pcb.register()\n{PRESENT}", MERGEKIT_PCB_AUTOLOAD="0")


def test_without_site_the_own_command_works():
    python(ABSENT, options=["-S"], PYTHONPATH=site_packages())
    result = python(
        "from mergekit_pcb.tools.cli import main; main(['yaml', '--help'], prog_name='x')",
        options=["-S"],
        PYTHONPATH=site_packages(),
    )
    assert "Usage: mergekit-pcb yaml" in result.stdout


def test_importing_is_light():
    heavy = "torch mergekit numpy pydantic click typing"
    result = python(
        f"""
        import sys
        # The start-up file has run.
        assert not {{"torch", "mergekit", "numpy"}} & set(sys.modules)
        for name in list(sys.modules):
            if name.startswith("mergekit_pcb"):
                del sys.modules[name]
        before = set(sys.modules)
        import mergekit_pcb
        assert not (set(sys.modules) - before) & set({heavy.split()!r}), set(sys.modules) - before
        import time
        times = []
        for _ in range(20):
            for name in list(sys.modules):
                if name.startswith("mergekit_pcb"):
                    del sys.modules[name]
            start = time.perf_counter()
            import mergekit_pcb
            times.append(time.perf_counter() - start)
        print(min(times))
        """,
        PYTHONDONTWRITEBYTECODE="",
    )
    assert float(result.stdout) < 5e-3  # 0.25 ms on two cores


def test_a_foreign_pcb_is_left_alone_with_a_warning():
    result = python("""
        import sys
        sys.modules.pop("mergekit_pcb.host.method", None)
        finders = [f for f in sys.meta_path if type(f).__module__.startswith("mergekit_pcb")]
        for finder in finders:
            sys.meta_path.remove(finder)
        import dataclasses
        import mergekit.merge_methods as m
        linear = m.get("linear")
        class Foreign(type(linear)):
            pass
        foreign = Foreign(dataclasses.replace(linear.spec, name="pcb"), linear.implementation)
        m.register(foreign)
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import mergekit_pcb._autoload as a
            a.install()
        assert m.get("pcb") is foreign
        (warning,) = caught
        assert "already has a method named pcb" in str(warning.message)
    """)
    assert result.stderr == ""


def test_the_entry_point_names_the_method():
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="mergekit.merge_methods", name="pcb")
    assert entry.load().spec.name == "pcb"


def site_packages():
    """Where this environment's packages and mergekit-pcb itself lie, for PYTHONPATH."""
    own = pathlib.Path(mergekit_pcb.__file__).parent.parent
    return os.pathsep.join([sysconfig.get_path("purelib"), str(own)])


@pytest.fixture
def environment(tmp_path):
    """An empty virtual environment that sees every package but mergekit-pcb."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in pathlib.Path(sysconfig.get_path("purelib")).iterdir():
        if "mergekit_pcb" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return tmp_path / "venv" / "bin" / "python", site


def pip(executable, *arguments):
    command = [sys.executable, "-m", "pip", "--python", str(executable), *arguments]
    result = subprocess.run(
        [*command, "--disable-pip-version-check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def source(tmp_path):
    """A copy of the source tree, so that building leaves nothing in it."""
    import shutil

    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "golden", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def install(executable, tmp_path, *options):
    pip(
        executable,
        "install",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        *options,
        str(source(tmp_path)),
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="wheel"),
        pytest.param(("--editable",), id="editable", marks=pytest.mark.slow),
    ],
)
def test_install_and_uninstall_leave_nothing_behind(environment, tmp_path, options):
    executable, site = environment
    before = {path.name for path in site.iterdir()}
    python(ABSENT, executable=executable)
    install(executable, tmp_path, *options)
    start_up = site / "mergekit_pcb_init.pth"
    assert len(start_up.read_text().splitlines()) == 1
    assert (site / "mergekit_pcb_init.start").read_text() == "mergekit_pcb._autoload:install\n"
    assert python(PRESENT, executable=executable).stderr == ""
    pip(executable, "uninstall", "--yes", "mergekit-pcb")
    assert {path.name for path in site.iterdir()} - {"__pycache__"} == before
    assert not (executable.parent / "mergekit-pcb").exists()
    python(ABSENT, executable=executable)


@pytest.mark.slow
def test_half_removed_or_broken_installations_do_not_disturb_anyone(environment, tmp_path):
    executable, site = environment
    install(executable, tmp_path)
    package = site / "mergekit_pcb"
    linear = """
        import torch
        from mergekit.merge_methods import merge_tensors
        both = [torch.zeros(2), torch.ones(2)]
        merged = merge_tensors(both, "linear", parameters={"weight": 1.0})
        assert merged.tolist() == [0.5, 0.5]
    """
    method = (package / "host" / "method.py").read_text()
    (package / "host" / "method.py").write_text("def broken")
    result = python(linear, executable=executable)
    assert result.stderr.count("RuntimeWarning") == 1
    assert "cannot provide all of merge_method: pcb, because SyntaxError" in result.stderr
    (package / "host" / "method.py").unlink()
    assert "because ModuleNotFoundError" in python(linear, executable=executable).stderr
    (package / "host" / "method.py").write_text(method)
    (package / "_autoload.py").write_text("def broken")
    assert python("print('fine')", executable=executable).stderr == ""
    assert python(linear, executable=executable).stderr == ""
    for file in package.rglob("*.py"):
        file.unlink()
    assert python(linear, executable=executable).stderr == ""
