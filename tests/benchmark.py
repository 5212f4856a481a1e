"""The benchmarks as modules: what they measure, the tests run in small."""
from importlib import util
from pathlib import Path

ROOT = Path(__file__).parent.parent

def the_benchmark(name):
    "`benchmarks/NAME.py`."
    spec = util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
