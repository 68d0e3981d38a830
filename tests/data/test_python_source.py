"""The standard library as text: there on every machine, in one order, without what is not its."""

import json
import sysconfig
from pathlib import Path

from lsjax.data.pieces import Document
from lsjax.data.sources import python_source


def test_modules_in_order_without_tests_packages_and_files_of_this_machine():
    source = python_source()
    root = Path(sysconfig.get_path("stdlib"))
    paths = [file.relative_to(root).as_posix() for file in source.files]
    assert paths == sorted(paths) and len(set(paths)) == len(paths) > 300
    assert {"json/decoder.py", "typing.py"} <= set(paths)
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert not [path for path in paths if left_out & set(path.split("/"))]
    assert not [path for path in paths if path.startswith("_sysconfigdata")]
    decoder = Path(json.decoder.__file__).read_text(encoding="utf-8")
    documents = list(source.documents())
    assert Document(decoder) in documents and len(documents) <= len(paths)
    assert source.stats() == python_source().stats()
