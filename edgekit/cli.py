"""The command line: parse, call, print. Decides nothing; heavy modules are imported inside the commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.errors import DoesNotFit
    from edgekit.onnx_planning import OnnxPlan
    from edgekit.pipeline import OnnxSource, Options
    from edgekit.planning import Plan
    from edgekit.target import Target

app = typer.Typer(
    name="edgekit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Put a language model on a small device, and prove that it is still good.",
    epilog="Start with: edgekit convert demo --target rpi5",
)
targets_app = typer.Typer(no_args_is_help=False, help="Devices: list, show, detect this machine.")
recipes_app = typer.Typer(no_args_is_help=False, help="Recipes: list, show.")
app.add_typer(targets_app, name="targets")
app.add_typer(recipes_app, name="recipes")


class Verify(StrEnum):
    none = "none"
    quick = "quick"
    full = "full"


class Certify(StrEnum):
    quick = "quick"
    full = "full"


class Effort(StrEnum):
    low = "low"
    normal = "normal"
    high = "high"


class Prefer(StrEnum):
    quality = "quality"
    speed = "speed"
    size = "size"


class Format(StrEnum):
    gguf = "gguf"
    onnx = "onnx"
    auto = "auto"


_MODEL_HELP = "Hub id (org/name\\[@revision]), folder, F16/BF16/F32 .gguf, or `demo`."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
TargetName = Annotated[str, typer.Option("--target", "-t", help="Device: a name, ./board.toml, or `host`.")]
Quant = Annotated[
    str | None, typer.Option("--quant", "-q", help="auto, or a preset such as Q4_K_M, IQ4_XS; int8, int4 for ONNX.")
]
FormatName = Annotated[Format | None, typer.Option("--format", help="gguf, onnx, or auto: what the target runs best.")]
Task = Annotated[
    str | None,
    typer.Option("--task", metavar="TASK", help="ONNX: text-generation, feature-extraction ... Default: by the model."),
]
Ctx = Annotated[int | None, typer.Option("--ctx-size", "-c", min=1, help="Context to make room for, in tokens.")]
Kv = Annotated[str | None, typer.Option("--kv", help="KV cache type: f16, q8_0, q4_0 ...")]
PreferOption = Annotated[Prefer | None, typer.Option("--prefer", help="What `auto` gives weight to.")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="A recipe name or ./mine.toml.")]
Size = Annotated[str | None, typer.Option("--target-size", help="Bytes the file may have: 700MiB, 3.2GiB.")]
Bpw = Annotated[float | None, typer.Option("--target-bpw", help="Bits per weight the file may have.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Default: the cores worth using.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]
File = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder made by `edgekit convert`, or a .gguf file.")]
Keep = Annotated[bool, typer.Option("--keep", help="Leave the result in the artefact folder, for `edgekit report`.")]
Against = Annotated[
    str,
    typer.Option(
        "--against", "-a", metavar="REF", help="The model it was made from, a GGUF, an artefact, or a stored reference."
    ),
]


@app.command()
def convert(
    model: Model,
    target: TargetName = "host",
    recipe: RecipeName = "default",
    format_: FormatName = None,
    quant: Quant = None,
    ctx_size: Ctx = None,
    kv: Kv = None,
    prefer: PreferOption = None,
    target_size: Size = None,
    target_bpw: Bpw = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to make; default NAME-TARGET.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Model name in file names and metadata.")] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="none, self, a text or .jsonl of chats, or an imatrix file.")
    ] = None,
    effort: Annotated[Effort, typer.Option("--effort", help="How much to read when calibrating.")] = Effort.normal,
    verify: Annotated[Verify | None, typer.Option("--verify", help="How much to prove afterwards.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Error if a tensor cannot hold its format.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and print; write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an artefact that is there.")] = False,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads to quantize with.")] = None,
    task: Task = None,
    json_: Json = False,
) -> None:
    """Convert MODEL for a device: a verified GGUF with what Ollama needs to import it, or ONNX, in a folder."""
    from edgekit import console, onnx_console, pipeline

    options = pipeline.Options(
        recipe=recipe,
        format=format_,
        quant=quant,
        context=ctx_size,
        kv=kv,
        prefer=prefer,
        target_size=_bytes(target_size),
        target_bpw=target_bpw,
        calibration=calibration,
        effort=effort,
        verify=verify,
        name=name,
        out=out,
        strict=strict,
        force=force,
        threads=threads,
        task=task,
    )
    with console.progress_bars(quiet=json_) as progress:
        done = pipeline.convert(model, target, options, dry_run=dry_run, progress=progress)
    if json_:
        _print_json(pipeline.conversion_summary(done))
    else:
        console.show_warnings(done.warnings)
        if isinstance(done, pipeline.OnnxConversion):
            console.out().print(onnx_console.conversion_screen(done))
        else:
            console.out().print(console.conversion_screen(done))


@app.command()
def plan(
    model: Model,
    target: TargetName = "host",
    all_targets: Annotated[bool, typer.Option("--all-targets", help="One table over all devices.")] = False,
    recipe: RecipeName = "default",
    format_: FormatName = None,
    quant: Quant = None,
    ctx_size: Ctx = None,
    kv: Kv = None,
    prefer: PreferOption = None,
    target_size: Size = None,
    target_bpw: Bpw = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor and its format.")] = False,
    task: Task = None,
    json_: Json = False,
) -> None:
    """What would be made for a device, from headers only: exact size, memory, forecast speed, does it fit."""
    from edgekit import console, pipeline
    from edgekit.planning import require_fit
    from edgekit.target import Target

    options = pipeline.Options(
        recipe=recipe,
        format=format_,
        quant=quant,
        context=ctx_size,
        kv=kv,
        prefer=prefer,
        target_size=_bytes(target_size),
        target_bpw=target_bpw,
        task=task,
    )
    device = Target.load(target)
    source: pipeline.Source | pipeline.OnnxSource
    with console.progress_bars(quiet=json_) as progress:
        if pipeline.export_format(model, device, options, progress=progress) == "onnx":
            source = pipeline.open_onnx(model, options, progress=progress)
        else:
            source = pipeline.open_source(model, progress=progress)
    if isinstance(source, pipeline.OnnxSource):
        _plan_onnx(source, device, options, model, all_targets=all_targets, tensors=tensors, json_=json_)
        return
    if all_targets:
        _show_plans(pipeline.plan_all(source, options), source.checkpoint.name, json_=json_)
        return
    decided = pipeline.plan_source(source, device, options)
    if json_:
        _print_json(pipeline.summary(decided, tensors=tensors))
    else:
        console.out().print(console.plan_screen(decided, device, model))
        if tensors:
            console.out().print(console.tensor_table(decided))
    require_fit(decided, pipeline.alternatives(source, device, options))


def _bytes(text: str | None) -> int | None:
    from edgekit.units import parse_bytes

    return None if text is None else parse_bytes(text)


def _plan_onnx(
    source: OnnxSource,
    device: Target,
    options: Options,
    model: str,
    *,
    all_targets: bool,
    tensors: bool,
    json_: bool,
) -> None:
    from edgekit import console, onnx_console, onnx_planning, pipeline

    if all_targets:
        _show_plans(pipeline.plan_all_onnx(source, options), source.checkpoint.name, json_=json_)
        return
    decided = pipeline.plan_onnx(source, device, options)
    if json_:
        _print_json(pipeline.summary(decided, tensors=tensors))
    else:
        console.show_warnings(decided.notes)
        learning = pipeline.learning_onnx(source, device, decided, options) if decided.memory.fits else ""
        console.out().print(onnx_console.plan_screen(decided, device, model, learning))
        if tensors:
            console.out().print(onnx_console.tensor_table(decided))
    onnx_planning.require_fit(decided)


def _show_plans(plans: Iterable[tuple[Target, Plan | OnnxPlan | DoesNotFit]], name: str, *, json_: bool) -> None:
    from edgekit import console, pipeline
    from edgekit.errors import DoesNotFit

    rows = list(plans)
    if not json_:
        console.out().print(console.all_targets_table(rows, name))
        return
    _print_json(
        [
            {"target": t.name, "fits": False, "error": str(p), "hint": p.hint}
            if isinstance(p, DoesNotFit)
            else pipeline.summary(p)
            for t, p in rows
        ]
    )


@app.command()
def bench(
    artifact: File,
    prompt: Annotated[
        str | None, typer.Option("--n-prompt", "-p", help="Prompt tokens (512), or tokens a text; several with commas.")
    ] = None,
    generate: Annotated[
        str | None, typer.Option("--n-gen", "-n", help="Tokens to generate (128); several with commas.")
    ] = None,
    texts: Annotated[int, typer.Option("--texts", min=0, help="Encoders: texts read at once.")] = 0,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", min=1, help="Runs of each test.")] = 5,
    threads: Threads = None,
    json_: Json = False,
    md: Annotated[bool, typer.Option("--md", help="Markdown table, as llama-bench prints it.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Comma-separated rows.")] = False,
    keep: Keep = False,
) -> None:
    """Measure prefill and decode speed on this machine, as llama-bench does; of an encoder, its latency."""
    from edgekit import benchmark, console
    from edgekit.artifact import model_file

    with console.progress_bars(quiet=json_) as progress:
        result = benchmark.bench(
            model_file(artifact),
            prompt=_numbers(prompt),
            generate=_numbers(generate),
            texts=texts,
            repetitions=repetitions,
            threads=threads,
            progress=progress,
        )
    if keep:
        benchmark.keep(result, artifact)
    if json_:
        _print_json(benchmark.as_json(result))
    elif md or csv:
        typer.echo(benchmark.markdown(result) if md else benchmark.as_csv(result))
    else:
        console.out().print(console.bench_screen(result))


@app.command("eval")
def evaluate(
    artifact: File,
    against: Against,
    text: Annotated[Path | None, typer.Option("--text", metavar="FILE", help="Held-out text, or .jsonl chats.")] = None,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="Read at most so many pieces of it.")] = None,
    ctx_size: Annotated[int | None, typer.Option("--ctx-size", "-c", min=16, help="Tokens of a piece.")] = None,
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="FILE", help="One prompt a line or .jsonl chats; builtin, or none.")
    ] = "builtin",
    answer_tokens: Annotated[int, typer.Option("--answer-tokens", "-n", min=1, help="Longest answer compared.")] = 48,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="NAMES", help="lm-evaluation-harness tasks or .yaml files, with commas."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions of each task.")] = None,
    floor: Annotated[bool, typer.Option("--floor/--no-floor", help="Measure the noise floor too.")] = True,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Store the reference's predictions (.npz).")
    ] = None,
    threads: Threads = None,
    keep: Keep = False,
    json_: Json = False,
) -> None:
    """Measure what was lost: perplexity, KL divergence, changed answers, task scores, against a reference."""
    from edgekit import console, evaluation, flips

    options = evaluation.Options(
        text=text,
        chunks=chunks,
        n_ctx=ctx_size,
        threads=threads,
        floor=floor,
        save=save,
        prompts=flips.prompts_from(prompts),
        answer_tokens=answer_tokens,
        tasks=tuple(name.strip() for name in (tasks or "").split(",") if name.strip()),
        limit=limit,
    )
    with console.progress_bars(quiet=json_) as progress:
        found = evaluation.evaluate(artifact, against, options, progress=progress)
    if keep:
        evaluation.keep(found, artifact)
    if json_:
        _print_json(found.as_json())
    else:
        console.show_warnings(found.notes)
        console.out().print(console.evaluation_screen(found))


@app.command()
def certify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder made by `edgekit convert`.")],
    against: Annotated[str, typer.Option("--against", "-a", metavar="MODEL", help="The model it was made from.")],
    level: Annotated[Certify, typer.Option("--level", help="full also measures the divergence.")] = Certify.quick,
    threads: Threads = None,
    json_: Json = False,
) -> None:
    """Prove an artefact again: its files, its source, tensors, tokens, prompts, numbers. Exit code 4 if one differs."""
    from edgekit import certification, console

    with console.progress_bars(quiet=json_) as progress:
        found = certification.certify(artifact, against, level=level, threads=threads, progress=progress)
    if json_:
        _print_json(found.as_json())
    else:
        console.show_warnings(found.certificate.warnings)
        console.out().print(console.certification_screen(found))


@app.command()
def report(
    artifacts: Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Folders made by `edgekit convert`.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Default: report.html beside the first one.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a file that edgekit did not make.")] = False,
    json_: Json = False,
) -> None:
    """Write one HTML page about one artefact, or several side by side; it opens from disk, without a network."""
    from edgekit import report as pages

    path = pages.write(artifacts, out, force=force)
    if json_:
        _print_json({"report": str(path), "bytes": path.stat().st_size, "artifacts": [str(a) for a in artifacts]})
    else:
        typer.echo(str(path))


def _numbers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise EdgekitError(
            f"{text!r} is not a list of token counts", "write for example -p 512 or -p 128,512"
        ) from None


@app.command()
def run(
    artifact: File,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to say; read from stdin where absent.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 = always the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same answer.")] = 0,
    ctx_size: Ctx = None,
    threads: Threads = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    json_: Json = False,
) -> None:
    """Answer a prompt with a converted model, in its own chat template."""
    from edgekit import generation
    from edgekit.artifact import model_file

    if prompt is None:
        prompt = sys.stdin.read()
    answer = generation.answer(
        model_file(artifact),
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        context=ctx_size,
        threads=threads,
        raw=raw,
        system=system,
        emit=None if json_ else _emit,
    )
    if json_:
        _print_json(asdict(answer))
    else:
        typer.echo()
        for said in (*answer.notes, answer.line()):
            typer.secho(said, err=True, dim=True)


def _emit(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@app.command()
def inspect(
    file: File,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Hash the files of an artefact again.")] = False,
    json_: Json = False,
) -> None:
    """What a GGUF or ONNX model holds: metadata, tensors, operators, bits per weight."""
    from edgekit import console, inspection
    from edgekit.artifact import model_file, open_artifact

    if check:
        with console.progress_bars(quiet=json_) as progress:
            open_artifact(file).verify(progress)
    found = inspection.inspect(model_file(file))
    if json_:
        _print_json(found.as_json(tensors=tensors))
    else:
        console.out().print(console.inspection_screen(found, tensors=tensors, checked=check))


@app.command()
def doctor(json_: Json = False) -> None:
    """Check this installation: versions, the native library, memory, disk, and what to fix."""
    from edgekit import console, diagnosis

    found = diagnosis.diagnose()
    if json_:
        _print_json([asdict(item) for item in found])
    else:
        console.out().print(console.diagnosis_screen(found))
    if any(not item.ok for item in found):
        raise typer.Exit(1)


@targets_app.callback(invoke_without_command=True)
def targets(context: typer.Context, json_: Json = False) -> None:
    """Devices: list, show, detect this machine."""
    if context.invoked_subcommand is None:
        targets_list(json_)


@targets_app.command("list")
def targets_list(json_: Json = False) -> None:
    """List the devices that edgekit knows."""
    from edgekit import console
    from edgekit.target import Target

    found = [Target.load(name) for name in Target.names()]
    if json_:
        _print_json([console.target_row(t) for t in found])
    else:
        console.out().print(console.targets_table(found))


@targets_app.command("show")
def targets_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A target, or ./board.toml.")], json_: Json = False
) -> None:
    """Show one device: every number with its source."""
    from edgekit import console
    from edgekit.target import Target

    target = Target.load(name)
    if json_:
        _print_json(target.model_dump(mode="json", exclude_none=True))
    else:
        console.out().print(console.target_screen(target))


@targets_app.command("detect")
def targets_detect(json_: Json = False) -> None:
    """Describe this machine: CPU features, memory, measured bandwidth, and the target that it matches."""
    from edgekit import console, host
    from edgekit.target import match_target

    with console.progress_bars(quiet=json_) as progress:
        progress("measure bandwidth", 0, 1)
        found = host.detect()
        bandwidth = host.measure_bandwidth()
        progress("measure bandwidth", 1, 1)
    matched = match_target(found)
    if json_:
        _print_json({"host": asdict(found), "bandwidth": asdict(bandwidth), "target": matched})
    else:
        console.out().print(console.host_screen(found, bandwidth, matched))


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, json_: Json = False) -> None:
    """Recipes: list, show."""
    if context.invoked_subcommand is None:
        recipes_list(json_)


@recipes_app.command("list")
def recipes_list(json_: Json = False) -> None:
    """List the recipes that edgekit ships."""
    from edgekit import console
    from edgekit.recipe import Recipe

    found = [Recipe.load(name) for name in Recipe.names()]
    if json_:
        _print_json([r.model_dump(mode="json") for r in found])
    else:
        console.out().print(console.recipes_table(found))


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A recipe, or ./mine.toml.")], json_: Json = False
) -> None:
    """Show one recipe as TOML."""
    from edgekit.recipe import Recipe

    found = Recipe.load(name)
    if json_:
        _print_json(found.model_dump(mode="json"))
    else:
        path = Path(name) if name.endswith(".toml") else Recipe.folder() / f"{name}.toml"
        typer.echo(path.read_text(encoding="utf-8"), nl=False)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"edgekit {version('edgekit')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Put a language model on a small device, and prove that it is still good."""


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return list(value)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """EdgekitError -> its code, message and hint; Ctrl-C -> 130; a closed pipe -> silence. No traceback for these."""
    try:
        yield
    except EdgekitError as e:
        _report(e)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        typer.secho("interrupted: nothing was left behind", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _report(error: EdgekitError) -> None:
    if "--json" in sys.argv:
        typer.echo(json.dumps({"error": str(error), "hint": error.hint, "exit_code": error.exit_code}))
    from edgekit import console

    console.show_error(error)


def main() -> None:
    """Entry point of the `edgekit` command."""
    # Work is spread over rows in threads of our own; threads of BLAS below them only fight (72 against 20 CPU seconds).
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with _exit_codes():
        run_app: Callable[..., Any] = app
        code = run_app(standalone_mode=True)
        if isinstance(code, int):
            sys.exit(code)
