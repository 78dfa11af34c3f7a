"""The house itself: floors, exports, light imports, and a README that runs."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import nobs

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nobs"

FLOORS = [
    {"errors"},
    {"_columns", "_names", "_order", "_onlookers", "_checked", "_callers"},
    {"_table", "_log", "_launch", "_board", "_never_fatal"},
    {"_readings"},
    {"_history"},
    {"_schema"},
    {
        "_ranks",
        "_stats",
        "_layers",
        "_given",
        "_codec",
        "_case",
        "_link",
        "_checkpoint",
        "_sigterm",
        "_watched",
        "_local",
        "_pipelines",
    },
    {"_kernels"},
    {"_row", "_group", "_lookout", "_break", "_parse", "_difference"},
    {"_taps", "_gradients", "_update", "_ring", "_blackbox", "triggers", "diagnosis", "render", "export"},
    {"_ending", "_tapped", "_recover", "_find", "_publish", "_dump"},
    {"_instrument", "_load", "_settings"},
    {"_merge"},
    {"_announce"},
    {"recorder"},
    {"cli"},
    {"__main__"},
]
"""From the ground up: a module imports only from floors below its own. Data flows the same way."""

WITHOUT_TORCH = {
    "errors",
    "_columns",
    "_readings",
    "_history",
    "_table",
    "_schema",
    "_names",
    "_order",
    "_codec",
    "_case",
    "_difference",
    "_break",
    "triggers",
    "diagnosis",
    "render",
    "export",
    "_blackbox",
    "_checked",
    "_find",
    "_load",
    "_log",
    "_parse",
    "_publish",
    "_recover",
    "_ranks",
    "_merge",
    "cli",
    "_launch",
}


def modules():
    """(module, file), with the package `render` as one module."""
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            yield name, path


def imported(path):
    """Names of the nobs modules that a file imports, at any place in it, those for type checkers left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):  # what stands under `if TYPE_CHECKING:` is not an import at run time
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    own = len(path.relative_to(PACKAGE).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == own:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


def floor(name):
    return next(i for i, names in enumerate(FLOORS) if name in names)


def test_floors():
    """Nothing imports its own floor or one above."""
    names = {name for name, _ in modules()}
    assert names == set().union(*FLOORS)
    for name, path in modules():
        for below in imported(path):
            assert floor(below) < floor(name), f"{path.name} imports {below}"


def test_the_torch_free_modules_import_only_each_other():
    """A dump opens where there is no torch."""
    for name, path in modules():
        if name in WITHOUT_TORCH:
            assert not re.search(r"^\s*(import|from) torch", path.read_text(), re.MULTILINE), path
            assert set(imported(path)) <= WITHOUT_TORCH, path


def run(code, *arguments):
    script = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import nobs", 0),
        ("import nobs; nobs.Report, nobs.triggers, nobs.load, nobs.TrainingFailure", 0),
        ("import nobs; nobs.instrument, nobs.Recorder, nobs.RingBuffer", 1),
        ("import rich", 2),  # proves that the test can fail
    ],
)
def test_light_import(code, expected):
    """`import nobs` loads neither torch nor rich nor matplotlib; recording loads torch and nothing to draw with."""
    check = "import sys; print(('torch' in sys.modules) + 2 * bool({'rich', 'matplotlib', 'torchvision'} & set(sys.modules)))"
    assert run(f"{code}\n{check}").stdout.strip() == str(expected)


def test_a_dump_opens_without_torch(tmp_path):
    """`nobs show` and `nobs plot` with torch blocked."""
    from samples import story_report

    from nobs import _codec

    path = _codec.save(story_report(), tmp_path / "rank00000.json")
    done = run(
        """
        import sys
        sys.modules["torch"] = None
        from nobs import cli
        sys.exit(cli.main(["show", sys.argv[1]]) + cli.main(["plot", sys.argv[1]]))
        """,
        str(path),
    )
    assert done.returncode == 0, done.stderr
    assert "loss is NaN at step 349" in done.stdout


def test_exports():
    """The public names, each importable, and no others; their home is private."""
    assert nobs.__all__ == [
        "Failure", "Finding", "History", "NobsError", "NobsWarning", "Recorder", "Report", "RingBuffer", "Row",
        "TrainingFailure", "TriggerEngine", "instrument", "load", "triggers", "uninstrument",
    ]  # fmt: skip
    for name in nobs.__all__:
        assert getattr(nobs, name) is not None
        assert name in dir(nobs)
    assert callable(nobs.instrument)
    assert re.fullmatch(r"\d+\.\d+\.\d+", nobs.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nobs.nothing  # noqa: B018


def test_every_public_thing_has_a_docstring():
    """Functions, classes and methods without an underscore say what they do."""
    for _, path in modules():
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_files_are_short():
    """A file fits on a few screens; the recorder, the one class that owns time, may be longer."""
    for name, path in modules():
        lines = len(path.read_text().splitlines())
        assert lines <= (360 if name == "recorder" else 265), (path.name, lines)


def python_blocks():
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_readme_snippets_run(tmp_path, monkeypatch, capsys, fresh_dynamo):
    """Every Python block of the README, in order, in one namespace, with a tiny model standing in for yours."""
    import torch
    from nets import Images

    monkeypatch.chdir(tmp_path)
    space = {"MyModel": Images, "loader": [Images().batch() for _ in range(3)], "loss_fn": torch.nn.functional.cross_entropy}
    blocks = python_blocks()
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)


def test_readme_commands_exist():
    """Files and tox environments that the README names are there."""
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:examples|bench|tests)/[\w/]+\.py", text):
        assert (ROOT / path).exists(), path
    tox = (ROOT / "tox.ini").read_text()
    for name in re.findall(r"tox run -e (\w+)", text):
        assert f"[testenv:{name}]" in tox


def test_only_ci_names_the_shared_folder():
    """The project knows real images by NOBS_MNIST alone."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "examples").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        assert "shared/data" not in path.read_text(), path
