"""The loader that every checkpoint carries: which modules it is made of, and what it says where it cannot load."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

import optimum_dobisvd
from optimum_dobisvd.checkpoint import bundle
from optimum_dobisvd.config import FORMAT_VERSION

ROOT = Path(optimum_dobisvd.__file__).parent


def relative_imports(path):
    """Of a module of the package, wherever they stand in it."""
    nodes = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level]


def test_the_modules_are_a_closure_in_the_order_of_their_imports():
    modules = bundle.bundled_modules()
    assert len(set(modules)) == len(modules)
    assert modules[-1] == Path("checkpoint", "bundled_entry.py")
    for index, path in enumerate(modules):
        for node in relative_imports(path):
            imported = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            assert imported in modules[:index], f"{path} imports {imported}, which must stand before it"


def test_every_import_of_another_module_can_be_taken_out():
    """They share one namespace in the bundled file: an import at the top of a module, of a name as it is."""
    for path in bundle.bundled_modules():
        top = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        lines = {node.lineno for node in top if isinstance(node, ast.ImportFrom)}
        for node in relative_imports(path):
            assert node.lineno in lines, f"{path}, line {node.lineno}: the import is not at the top of the module"
            assert not any(alias.asname for alias in node.names), f"{path}, line {node.lineno}: imported as another"


def test_no_compressor_is_among_them():
    folders = {path.parts[0] for path in bundle.bundled_modules()}
    assert not folders & {"allocation", "calibration", "pipeline", "learning", "integrations", "statistics"}
    assert not folders & {"quantizer.py", "config.py"}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"one": "def twice():\n    pass\n", "two": "class twice:\n    pass\n"},
            "two.py and .*one.py both define twice",
        ),
        ({"one": "x: int = 1\ntwice = 2\n", "two": "twice = 3\n"}, "two.py and .*one.py both define twice"),
        ({"one": "x = 1\n", "two": "x: int = 1\n"}, "two.py and .*one.py both define x"),
        ({"one": "def twice(): ...\n\n\ntwice = 1\n"}, "one.py and .*one.py both define twice"),
    ],
)
def test_a_name_that_two_modules_define_is_refused(monkeypatch, tmp_path, sources, message):
    """The later would take the place of the earlier, for both."""
    paths = [tmp_path / f"{name}.py" for name in sources]
    for path, source in zip(paths, sources.values(), strict=True):
        path.write_text(source)
    monkeypatch.setattr(bundle, "bundled_modules", lambda: paths)
    with pytest.raises(ValueError, match=f"{message}, and they are bundled in one file"):
        bundle.modeling_source.__wrapped__()


def test_names_that_differ_are_bundled_without_the_imports_of_each_other(monkeypatch, tmp_path):
    (tmp_path / "one.py").write_text("import math\n\nx = math.pi\n")
    (tmp_path / "two.py").write_text("import math\nfrom .one import (\n    x,\n)\n\ny = x + math.pi\n")
    monkeypatch.setattr(bundle, "bundled_modules", lambda: [tmp_path / "one.py", tmp_path / "two.py"])
    source = bundle.modeling_source.__wrapped__()
    assert "from ." not in source
    namespace = {}
    exec(source, namespace)
    assert namespace["y"] == 2 * namespace["x"]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """The bundled loader, imported from its file."""
    path = tmp_path_factory.mktemp("bundled") / bundle.MODELING_FILE
    path.write_text(bundle.modeling_source(), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("bundled_loader_under_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[spec.name]


def test_it_reads_the_format_that_the_package_writes(bundled):
    assert bundled.SUPPORTED_FORMAT == FORMAT_VERSION
    assert bundled.CheckpointConfig(format_version=FORMAT_VERSION, modules={}).quant_method == "dobi_svd"


@pytest.mark.parametrize(
    ("version", "remedy"),
    [
        (1, "or compress the model again"),
        (3, "or pip install -U optimum-dobisvd"),
        ("2", "or compress the model again"),
        (None, "or compress the model again"),
    ],
)
def test_it_refuses_other_formats_in_words(bundled, version, remedy):
    says = f"config.json says dobi_svd format {version!r}, and the loader beside it reads format 2 alone: "
    with pytest.raises(ValueError, match=f"{says}copy all files from one checkpoint, {remedy}"):
        bundled.CheckpointConfig.from_dict({"format_version": version, "modules": {}})


def test_it_has_an_entry_for_every_auto_class_and_no_other(bundled):
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        entry = getattr(bundled, f"DobiSVD{name}")
        assert entry.__name__ == f"DobiSVD{name}"
        assert entry.auto_class.__name__ == name
    for name in ("DobiSVDAutoModelForNothing", "DobiSVDBert", "AutoModel", "DobiSVDHfQuantizer"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(bundled, name)
