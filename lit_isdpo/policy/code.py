"""Python code that comes with a model: the files that an ``auto_map`` names, and those that these import beside them.

transformers writes an ``auto_map`` into each folder that it makes, and of the files only those of the object at hand.
A value with ``--`` in it names a repository of the hub, which has its file; any other says that its file lies beside.
"""

import json
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils.hub import cached_file

from lit_isdpo.policy.loading import PolicyConfig, model_path

CONFIG_FILE = "config.json"


def code_files(folder: Path, kinds: Collection[str] | None = None) -> list[str]:
    """The Python files that a model's folder says lie in it, whether they do or not.

    Args:
        folder: with the configurations of a model and its tokenizer.
        kinds: of the auto classes, such as ``AutoConfig``, that the files are for. Default: of all.
    """
    references: list[Any] = []
    for name in (CONFIG_FILE, TOKENIZER_CONFIG_FILE):
        for kind, value in _auto_map(folder / name).items():
            if kinds is None or kind in kinds:
                references += value if isinstance(value, list) else [value]
    files = [Path(each.rpartition(".")[0] + ".py") for each in references if isinstance(each, str) and "--" not in each]
    inside = [file for file in files if not file.is_absolute() and ".." not in file.parts]
    return list(dict.fromkeys(map(str, inside)))


def copy_code(source: PolicyConfig, folder: Path) -> None:
    """Copies the files that ``folder`` names from the model that it was made of, as far as they are there.

    A file that is not there is none that the model was loaded with, so nothing is downloaded.
    """
    path = model_path(source)
    for name in code_files(folder):
        with suppress(OSError):
            found = str(cached_file(path, name, revision=source.revision, local_files_only=True))
            place = Path(found).parent
            for file in (found, *get_relative_import_files(found)):
                target = (folder / name).parent / Path(file).relative_to(place)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def _auto_map(file: Path) -> dict[str, Any]:
    """What a configuration says, or nothing; older ones of tokenizers have a list of their two classes."""
    content = None
    with suppress(OSError, ValueError):
        content = json.loads(file.read_text())
    found = content.get("auto_map") if isinstance(content, dict) else None
    if isinstance(found, list):
        return {"AutoTokenizer": found}
    return found if isinstance(found, dict) else {}
