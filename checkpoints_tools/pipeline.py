"""`megatron-video ckpt pipeline`: all models in the folder that the public inference code loads, and out of it."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from checkpoints_tools.convert import Conversion, Converter, Options
from checkpoints_tools.journal import Journal, begin_output, check_absent, check_room, source_identity
from checkpoints_tools.models import KINDS
from checkpoints_tools.pipeline_layout import (
    FOLDERS,
    LLM_TOKENIZER_FOLDER,
    PART_KINDS,
    PIPELINE_FILE,
    STEP_TOKENIZER_FILE,
    Tokenizers,
    check_fit,
    copy_files,
    find_tokenizers,
    unloadable,
    write_configs,
)
from checkpoints_tools.safetensors_files import GIGABYTE
from megatron_video.errors import UserError


@dataclass(frozen=True)
class Pipeline:
    """A folder of all models."""

    output: str
    parts: Mapping[str, Conversion]
    tokenizers: Mapping[str, str]
    """File -> sha256; empty if nothing was written."""
    unloadable: list[str]
    """Why the public code cannot load it; empty: it can. Of a folder that was taken apart: empty."""


class Assembly:
    """Several models on their way into one folder; everything that needs no tensor is checked when it is made."""

    def __init__(self, sources: Mapping[str, Path], tokenizers: Tokenizers, output: Path, options: Options) -> None:
        """Check every part by itself.

        Args:
            sources: part (pipeline_layout.FOLDERS) -> weights of any form.
            tokenizers: of the text encoders.
            output: folder to create.
            options: of every part.

        Raises:
            UserError: as Converter does; a part of another kind; a tokenizer of another model; no room for all.
        """
        check_absent(output)
        self._sources, self._output, self._options = sources, output, options
        self._files = tokenizers.files(FOLDERS["llm"] if options.to == "released" else LLM_TOKENIZER_FOLDER)
        self._parts = {
            part: Converter(path, output / FOLDERS[part], _options_of(part, options)) for part, path in sources.items()
        }
        self.models = {part: converter.model for part, converter in self._parts.items()}
        for part, model in self.models.items():
            if model.kind != PART_KINDS[part]:
                wanted, found = KINDS[PART_KINDS[part]].title, KINDS[model.kind].title
                raise UserError(f"{sources[part]} holds a {found}; the part {part!r} is a {wanted}")
        tokenizers.check(self.models)
        check_room(output, sum(converter.bytes for converter in self._parts.values()))

    def run(self, verify: bool) -> tuple[dict[str, Conversion], dict[str, str]]:
        """Write and publish the folder; a killed one goes on. Returns the parts, and tokenizers' files -> sha256.

        Raises:
            UserError: see Converter.run.
            OSError: naming the file that could not be written.
        """
        with begin_output(self._output, self._identity()) as journal:
            reports = {part: self._run_part(part, journal, verify) for part in self._parts}
            digests = copy_files(self._files, journal.folder)
            if self._options.to == "released":
                write_configs(journal.folder)
            journal.publish()
        return reports, digests

    def report(self) -> dict[str, Conversion]:
        """What would be done."""
        return {part: converter.report(None, False, 0.0) for part, converter in self._parts.items()}

    def _identity(self) -> dict[str, Any]:
        paths = [*self._sources.values(), *self._files.values()]
        settings = {"to": self._options.to, "shard_bytes": self._options.shard_bytes}
        return {"command": "pipeline", "sources": source_identity(*paths), **settings}

    def _run_part(self, part: str, journal: Journal, verify: bool) -> Conversion:
        converter, finished = self._parts[part], list(journal.position or [])
        converter.output = journal.folder / FOLDERS[part]
        known = {name.removeprefix(f"{part}/"): d for name, d in journal.done.items() if name.startswith(f"{part}/")}
        if part in finished:
            return converter.report(known, verify, 0.0)
        start = time.monotonic()
        # From now on a kill leaves something to go on with.
        journal.note(journal.done, finished)
        # Complete, but killed before that was noted.
        shutil.rmtree(converter.output, ignore_errors=True)
        converter.output.parent.mkdir(exist_ok=True)
        digests = converter.run(verify)
        journal.note({**journal.done, **{f"{part}/{name}": d for name, d in digests.items()}}, [*finished, part])
        return converter.report(digests, verify, time.monotonic() - start)


def _options_of(part: str, options: Options) -> Options:
    # Some models are one file in the public code, whatever their size.
    cut = KINDS[PART_KINDS[part]].shard_gigabytes is not None
    return options if cut else replace(options, shard_bytes=None)


def assemble(
    sources: Mapping[str, Path],
    tokenizers: Tokenizers,
    output: Path,
    *,
    shard_bytes: int | None = None,
    other_sizes: bool = False,
    verify: bool = True,
    dry_run: bool = False,
) -> Pipeline:
    """Put the four models into a folder that the public inference code loads.

    Args:
        sources: part -> weights of any form.
        tokenizers: of the text encoders.
        output: folder to create.
        shard_bytes: largest file; None: as released.
        other_sizes: also write what only this repository can load.
        verify: read the parts back.
        dry_run: check only.

    Raises:
        UserError: parts that do not fit each other or the public code; see Assembly.
    """
    assembly = Assembly(sources, tokenizers, output, Options(to="released", shard_bytes=shard_bytes))
    check_fit(assembly.models)
    reasons = unloadable(assembly.models)
    if reasons and not other_sizes:
        raise UserError(
            f"the public inference code cannot load these models: {'; '.join(reasons)}. --other-sizes writes the "
            "folder all the same, for `megatron-video sample`"
        )
    parts, digests = (assembly.report(), {}) if dry_run else assembly.run(verify)
    return Pipeline(str(output), parts, digests, reasons)


def take_apart(folder: Path, output: Path, *, verify: bool = True, dry_run: bool = False) -> Pipeline:
    """Make a megatron-core checkpoint of every model of a pipeline folder, and copy the tokenizers.

    Args:
        folder: as `assemble` writes it, or released.
        output: folder to create, with the same folders in it.
        verify: read the parts back.
        dry_run: check only.

    Raises:
        UserError: it is no such folder; see Assembly.
    """
    if not (folder / PIPELINE_FILE).is_file():
        raise UserError(f"{folder} has no {PIPELINE_FILE}: it is no whole pipeline; `ckpt convert` takes single models")
    sources = {part: folder / place for part, place in FOLDERS.items()}
    missing = [str(path) for path in sources.values() if not path.is_dir()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; `ckpt convert` takes the models that are there")
    tokenizers = find_tokenizers(sources, None, None)
    assembly = Assembly(sources, tokenizers, output, Options(to="core"))
    parts, digests = (assembly.report(), {}) if dry_run else assembly.run(verify)
    return Pipeline(str(output), parts, digests, [])


def add_command(commands: Any) -> None:
    """The subcommand `pipeline`."""
    command = commands.add_parser(
        "pipeline",
        help="the whole folder that the public Step-Video-T2V inference code loads, put together or taken apart",
        description="Put together: --transformer, --vae, --clip and --llm, each of any form. Taken apart: --in. "
        "Tensors keep their types and bits; a killed command goes on when given again.",
    )
    for part, kind in PART_KINDS.items():
        command.add_argument(f"--{part}", type=Path, help=f"weights of the {KINDS[kind].title}")
    command.add_argument("--clip-tokenizer", type=Path, help="folder with vocab.txt (default: beside --clip)")
    command.add_argument("--llm-tokenizer", type=Path, help=f"{STEP_TOKENIZER_FILE} (default: beside --llm)")
    command.add_argument("--in", dest="folder", type=Path, help="a whole pipeline, to be taken apart")
    command.add_argument("--out", type=Path, required=True, help="folder to create; an existing one is refused")
    command.add_argument("--max-shard-gb", type=float, help="largest file but the VAE's, GB (default: as released)")
    command.add_argument("--other-sizes", action="store_true", help="write what the public code cannot load, too")
    command.add_argument("--dry-run", action="store_true", help="check everything that needs no tensors")
    command.add_argument("--no-verify", action="store_true", help="do not read the output back")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    given = {part: getattr(arguments, part) for part in FOLDERS if getattr(arguments, part) is not None}
    checks = {"verify": not arguments.no_verify, "dry_run": arguments.dry_run}
    if arguments.folder is not None:
        if given or arguments.clip_tokenizer or arguments.llm_tokenizer or arguments.max_shard_gb is not None:
            raise UserError("--in takes a whole pipeline apart; the parts' options put one together: give one or other")
        report = take_apart(arguments.folder, arguments.out, **checks)
    else:
        missing = [f"--{part}" for part in FOLDERS if part not in given]
        if missing:
            raise UserError(
                f"a pipeline needs all four models: {', '.join(missing)} missing (or --in, to take one apart)"
            )
        tokenizers = find_tokenizers(given, arguments.clip_tokenizer, arguments.llm_tokenizer)
        limit = None if arguments.max_shard_gb is None else int(arguments.max_shard_gb * GIGABYTE)
        report = assemble(
            given, tokenizers, arguments.out, shard_bytes=limit, other_sizes=arguments.other_sizes, **checks
        )
    _print(report, arguments)
    return 0


def _print(report: Pipeline, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(asdict(report)))
        return
    for part, each in report.parts.items():
        checked = "read back and equal" if each.verified else "not read back"
        size = f"{each.tensors} tensors, {each.parameters:,} parameters, {each.bytes / GIGABYTE:.3f} GB"
        print(f"{FOLDERS[part]}: {each.direction}, {size}, {'not written' if arguments.dry_run else checked}")
    if arguments.dry_run:
        print(f"would be written: {report.output}; nothing was")
        return
    for name, found in report.tokenizers.items():
        print(f"{name}: copied, sha256 {found}")
    for reason in report.unloadable:
        print(f"the public inference code cannot load it: {reason}")
    print(f"written: {report.output}")
