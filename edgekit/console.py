"""What a person sees in the terminal: progress bars, tables, the last screen. Talk goes to stderr, results to stdout.

Makes no decision and computes no figure; imports rich only when something is shown.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgekit.errors import DoesNotFit, EdgekitError
from edgekit.units import Progress, show_bytes, show_count, silent

if TYPE_CHECKING:
    from rich.box import Box
    from rich.console import Console, RenderableType
    from rich.table import Table

    from edgekit.benchmark import BenchResult, Measurement
    from edgekit.certification import Certification
    from edgekit.diagnosis import Finding
    from edgekit.evaluation import Evaluation
    from edgekit.flips import Answer, Flips
    from edgekit.host import Bandwidth, Host
    from edgekit.inspection import Inspection, OnnxInspection
    from edgekit.onnx_planning import OnnxPlan
    from edgekit.pipeline import Conversion
    from edgekit.planning import Memory, Plan
    from edgekit.quality import Comparison
    from edgekit.recipe import Recipe
    from edgekit.similarity import Agreement
    from edgekit.target import Target
    from edgekit.tasks import Score

BYTES = ("download", "hash")
"""Tasks whose totals are bytes; `quantize` counts weights, the others count steps."""


def talk() -> Console:
    """The console for messages."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def out() -> Console:
    """The console for results. Piped, it is wide enough for every table, so that nothing is cut."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else max(180, _columns()))


def _columns() -> int:
    text = os.environ.get("COLUMNS", "")
    return int(text) if text.isdigit() else 0


def _wide() -> bool:
    return out().width >= 130


def show_error(error: EdgekitError) -> None:
    """`error:` and, where there is one, `hint:` with the next command."""
    from rich.text import Text

    console = talk()
    console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("hint:  ", "bold cyan"), error.hint), soft_wrap=True)


def show_warnings(warnings: Sequence[str]) -> None:
    from rich.text import Text

    for warning in warnings:
        talk().print(Text.assemble(("note:  ", "bold yellow"), warning), soft_wrap=True)


@contextmanager
def progress_bars(*, quiet: bool = False) -> Iterator[Progress]:
    """A Progress that draws one bar for each task on stderr, with what is done, speed and time left.

    Not on a terminal, it prints one line when a task that took over a second ends.
    """
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as progress:
            yield progress
    else:
        yield _Lines()


class _Lines:
    """Progress for logs: a line for each finished task that was long enough to wonder about."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}

    def __call__(self, task: str, done: int, total: int) -> None:
        if total == 0:
            print(task, file=sys.stderr, flush=True)  # noqa: T201
            return
        now = time.monotonic()
        started = self._started.setdefault(task, now)
        if done < total:
            return
        del self._started[task]  # the same task may begin again later
        if now - started > 1:
            print(f"{task}: done in {now - started:.0f} s", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=32),
        TextColumn("{task.fields[shown]}"),
        TextColumn("[dim]{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=talk(), transient=True) as bars:
        known: dict[str, Any] = {}

        def progress(task: str, done: int, total: int) -> None:
            if total == 0:
                bars.console.print(f"[dim]{plain(task)}", soft_wrap=True)
                return
            if task not in known:
                known[task] = bars.add_task(task, total=total, shown="")
            elif bars.tasks[known[task]].finished:  # the same task again
                bars.reset(known[task])
            bars.update(known[task], completed=done, total=total, shown=_amount(task, done, total))

        yield progress


def _amount(task: str, done: int, total: int) -> str:
    if task.startswith(BYTES):
        return f"{show_bytes(done)} of {show_bytes(total)}"
    if task == "quantize":
        return f"{show_count(done)} of {show_count(total)} weights"
    return f"{done} of {total}"


# --- plans -----------------------------------------------------------------------------------------------------------


def plan_screen(plan: Plan, target: Target, name: str) -> RenderableType:
    """Everything that was decided, for one target."""
    rows = [("file", _file_line(plan)), ("formats", _formats_line(plan))]
    rows += _memory_rows(plan, target)
    rows.append(("speed", speed_line(plan)))
    rows.append(("chosen", f"{plan.preset.name}: {plan.why}"))
    if plan.fallbacks:
        rows.append(("fallback", _fallback_line(plan)))
    if plan.blueprint.ignored:
        rows.append(("left out", f"{len(plan.blueprint.ignored)} tensors, first {plan.blueprint.ignored[0]}"))
    rows.append(("next", f"[bold cyan]edgekit convert {plain(name)} --target {plan.target} -q {plan.preset.name}"))
    return panel(rows, plain(f"plan: {name} on {target.title}"))


def _file_line(plan: Plan) -> str:
    return (
        f"[bold]{show_bytes(plan.file_bytes)}[/] [dim]({plan.file_bytes:,} bytes)[/], "
        f"{show_count(plan.parameters)} parameters at {plan.bits_per_weight:.2f} bits per weight"
    )


def _formats_line(plan: Plan) -> str:
    return ", ".join(f"{name} {show_bytes(n)}" for name, n in plan.bytes_by_format.items())


def _fallback_line(plan: Plan) -> str:
    pairs: dict[str, int] = {}
    for t in plan.fallbacks:
        key = f"{t.wanted} → {t.format.name}"
        pairs[key] = pairs.get(key, 0) + 1
    first = plan.fallbacks[0]
    return f"[yellow]{', '.join(f'{n} × {k}' for k, n in pairs.items())}[/] (rows of {first.shape[-1]}: {first.name})"


def _memory_rows(plan: Plan, target: Target) -> list[tuple[str, str]]:
    memory = plan.memory
    parts = f"weights {show_bytes(memory.weights)}"
    if memory.twice:
        parts += f" + output copy {show_bytes(memory.twice)}"
    parts += f" + KV {plan.kv_type} {show_bytes(memory.kv)}"
    parts += f" + buffers {show_bytes(memory.compute)} + runtime {show_bytes(memory.overhead)}"
    rows = [("memory", f"[bold]{show_bytes(memory.total)}[/] at {plan.context} tokens of context")]
    rows.append(("", f"[dim]{parts}"))
    rows.append(("", f"{memory_bar(memory)} {headroom(memory, target)}"))
    rows.append(("", f"[dim]rule of thumb M = (P·4 B)/(32/Q)·1.2 says {show_bytes(plan.rule_of_thumb)}"))
    if memory.kv:
        kinds = ("f16", "q8_0", "q4_0")
        rows.append(("KV cache", ", ".join(f"{kind} {show_bytes(plan.kv_bytes[kind])}" for kind in kinds)))
    return rows


def memory_bar(memory: Memory, width: int = 28) -> str:
    """A bar of what is used of what is usable: green, yellow above 80 %, red when it does not fit."""
    if not memory.usable:
        return ""
    share = memory.total / memory.usable
    color = "red" if share > 1 else "yellow" if share > 0.8 else "green"
    full = min(width, round(share * width))
    return f"[{color}]{'━' * full}[/][dim]{'─' * (width - full)}[/]"


def headroom(memory: Memory, target: Target) -> str:
    if memory.usable is None or memory.headroom is None:
        return "[dim]the usable memory of this target is not known"
    spare = f"the {show_bytes(memory.usable)} that {plain(target.name)} can spare"
    if memory.headroom < 0:
        return f"[red]{show_bytes(-memory.headroom)} more than {spare}"
    return f"{show_bytes(memory.headroom)} left of {spare}"


def speed_line(plan: Plan) -> str:
    """Forecast decode and prefill with their bands, called a forecast."""
    f = plan.forecast
    if not plan.geometry.causal:
        known = f.prefill_tok_s
        return f"forecast [bold]{rate(known)} tok/s[/] read" if known else f"[dim]no forecast: {f.basis}"
    if f.decode_tok_s is None:
        return f"[dim]no forecast: {f.basis}"
    low, high = f.decode_range or (0.0, 0.0)
    text = f"forecast [bold]{rate(f.decode_tok_s)} tok/s[/] decode ({rate(low)} to {rate(high)})"
    if f.prefill_tok_s:
        text += f", {rate(f.prefill_tok_s)} tok/s prefill"
    return f"{text} [dim]({f.backend}; edgekit bench measures)"


def rate(tok_s: float) -> str:
    return f"{tok_s:.0f}" if tok_s >= 100 else f"{tok_s:.3g}"


def all_targets_table(rows: Sequence[tuple[Target, Plan | OnnxPlan | DoesNotFit]], name: str) -> Table:
    """One row for each device."""
    from rich.table import Table

    table = Table(title=f"{plain(name)} on every target", title_justify="left", header_style="bold", box=_lines())
    table.add_column("target", no_wrap=True)
    if _wide():
        table.add_column("device", no_wrap=True)
    table.add_column("preset", no_wrap=True)
    for column in ("file", "memory", "usable", "decode", "prefill"):
        table.add_column(column, justify="right", no_wrap=True)
    for target, plan in rows:
        names = (target.name, plain(target.title)) if _wide() else (target.name,)
        table.add_row(*names, *_target_cells(target, plan))
    table.caption = "forecasts in tok/s; edgekit plan MODEL --target NAME says more"
    return table


def _target_cells(target: Target, plan: Plan | OnnxPlan | DoesNotFit) -> tuple[str, ...]:
    usable = show_bytes(target.usable_bytes) if target.usable_bytes else "?"
    if isinstance(plan, DoesNotFit):
        return "[red]does not fit", "", "", usable, "", ""
    f, total = plan.forecast, show_bytes(plan.memory.total)
    return (
        plan.label,
        show_bytes(plan.file_bytes),
        total if plan.memory.fits else f"[red]{total}",
        usable,
        rate(f.decode_tok_s) if f.decode_tok_s else "?",
        rate(f.prefill_tok_s) if f.prefill_tok_s else "?",
    )


def _lines() -> Box:
    from rich.box import SIMPLE_HEAD

    return SIMPLE_HEAD


# --- the last screen -------------------------------------------------------------------------------------------------


def conversion_screen(done: Conversion) -> RenderableType:
    """What was made, how big, what it needs, how fast, how good, and the next command."""
    plan, target = done.plan, done.target
    rows: list[tuple[str, str]] = []
    if done.artifact:
        rows.append(("made", f"[bold]{plain(str(done.artifact.model))}"))
    rows.append(("size", _file_line(plan)))
    rows.append(("quant", f"{plan.preset.name} [dim]({plan.why})"))
    rows += _memory_rows(plan, target)[:1]
    if bar := memory_bar(plan.memory):
        rows.append(("", f"{bar} {headroom(plan.memory, target)}"))
    rows.append(("speed", speed_line(plan)))
    if plan.fallbacks:
        rows.append(("fallback", _fallback_line(plan)))
    rows += _gate_rows(done)
    if done.certificate and done.certificate.checks:
        rows += [("proof" if i == 0 else "", f"[green]✓[/] {line}") for i, line in enumerate(_proof(done))]
    elif done.artifact:
        rows.append(("proof", "[yellow]not verified (--verify none)"))
    rows += _next_rows(done)
    return panel(rows, plain(f"{done.source.checkpoint.name} for {target.title}"))


def _gate_rows(done: Conversion) -> list[tuple[str, str]]:
    """Every candidate with its KL divergence; the one that is shipped is marked."""
    if done.outcome is None:
        return []
    rows = []
    for i, c in enumerate(done.outcome.candidates):
        line = f"{c.kl:.5f} ± {c.kl_stderr:.5f}  {c.name}"
        rows.append(("gate" if i == 0 else "", f"[bold green]{line}  shipped[/]" if c.shipped else f"[dim]{line}"))
    text = f"KL divergence in nats a token on {done.outcome.held_out:,} held-out predictions"
    return [*rows, ("", f"[dim]{text} of {plain(done.outcome.text)}")]


def _proof(done: Conversion) -> list[str]:
    assert done.certificate
    lines = [check.detail for check in done.certificate.checks]
    against: Mapping[str, Any] = done.certificate.figures.get("against_source", {})
    if against:
        lines[-1] = (
            f"KL divergence {against['kl_mean']:.5f} ± {against['kl_stderr']:.5f}, the same top token "
            f"{against['top1']:.2%} of the time, against the unquantised model"
        )
    return lines


def _next_rows(done: Conversion) -> list[tuple[str, str]]:
    if not done.artifact:
        return [("next", "[bold cyan]the same without --dry-run makes it")]
    name, place = done.source.checkpoint.name.lower(), plain(str(done.out))
    rows = [("next", f"[bold cyan]edgekit bench {place}")]
    if done.plan.geometry.causal:
        rows = [("next", f'[bold cyan]edgekit run {place} "Hello"'), ("", f"[cyan]edgekit bench {place}")]
    if (done.out / "Modelfile").is_file():
        rows.append(("", f"[cyan]cd {place} && ollama create {name} -f Modelfile"))
    return rows


def panel(rows: Sequence[tuple[str, str]], title: str) -> RenderableType:
    from rich.box import ROUNDED
    from rich.panel import Panel
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, text)
    return Panel(grid, title=f"[bold]{title}", title_align="left", box=ROUNDED, padding=(0, 1), expand=False)


def tensor_table(plan: Plan) -> Table:
    """Every tensor of a plan."""
    rows = [
        (t.name, t.shape, t.format.name, t.nbytes, "" if t.wanted == t.format.name else t.wanted) for t in plan.tensors
    ]
    return table_of_tensors(rows, "wanted")


def table_of_tensors(rows: Sequence[tuple[str, Sequence[int], str, int, str]], last: str) -> Table:
    from rich.table import Table

    table = Table(header_style="bold", box=_lines())
    table.add_column("tensor", no_wrap=True)
    for column in ("shape", "format", "bytes", last):
        table.add_column(column, justify="right", no_wrap=True)
    for name, shape, format_, nbytes, note in rows:
        table.add_row(plain(name), " × ".join(map(str, shape)), format_, f"{nbytes:,}", note)
    return table


def bench_screen(result: BenchResult) -> RenderableType:
    """Tokens per second with their spread, memory, time to first token, and what may have distorted them."""
    size = f"{show_bytes(result.model_size)}, {show_count(result.model_n_params)} parameters"
    rows = [("model", f"[bold]{plain(result.model_type)}[/] [dim]({size})")]
    for test in result.tests:
        rows.append(("speed" if test is result.tests[0] else "", _speed_line(result, test)))
    own = result.peak_rss_bytes - result.baseline_rss_bytes
    rows.append(("memory", f"{show_bytes(result.peak_rss_bytes)} at its peak, {show_bytes(own)} of it the model's"))
    rows.append(("loaded", f"in {result.load_ms:.0f} ms"))
    build = result.build
    backend = f"{build['backends']} with {result.settings.threads} threads"
    rows.append(("on", f"{plain(str(build['cpu_info']))}, {backend}"))
    rows.append(("build", f"{plain(str(build['runtime']))} [dim]({build['build_commit']})"))
    rows += [("note", f"[yellow]{plain(note)}") for note in result.notes]
    return panel(rows, "bench")


def _speed_line(result: BenchResult, test: Measurement) -> str:
    if test.latency_ms is not None:
        what = "1 text" if test.texts == 1 else f"{test.texts} texts"
        line = f"[bold]{test.latency_ms:.3g} ms[/] for {what} of {test.n_prompt} tokens"
        return f"{line}, {rate(test.texts_per_s or 0)} texts/s [dim]({len(test.samples_ns)} runs)"
    kind = "prefill" if test.n_prompt else "decode"
    line = f"[bold]{rate(test.avg_ts)} tok/s[/] ± {rate(test.stddev_ts)} {kind} [dim]({test.name}"
    line += f", {len(test.samples_ns)} runs)"
    if gbs := result.achieved_gbs(test):
        line += f"[/], {gbs:.2f} GB/s of weights"
    if test.ttft_ms is not None:
        line += f"[/], first token after {test.ttft_ms:.0f} ms"
    return line


# --- evaluation ------------------------------------------------------------------------------------------------------

SHOWN = 6
"""Changed answers that a screen shows; --json has all of them."""


def evaluation_screen(found: Evaluation) -> RenderableType:
    """Perplexities, divergence with its floor, changed answers and task scores, every figure with its error."""
    size = f" [dim]({show_bytes(found.nbytes)})"
    rows = [("model", f"[bold]{plain(found.artifact)}[/]{size}")]
    rows.append(("against", f"{plain(found.reference)}{' [dim](stored)' if found.kind == 'stored' else ''}"))
    if found.embeddings:
        rows += _embedding_rows(found.embeddings, found.text)
    if found.comparison:
        rows += _divergence_rows(found, found.comparison)
    if found.flips:
        rows += _flip_rows(found.flips)
    rows += _task_rows(found.tasks, found.reference_tasks)
    return panel(rows, "eval")


def _embedding_rows(a: Agreement, text: str) -> list[tuple[str, str]]:
    return [
        ("text", f"{plain(text)}: {a.texts} sentences, vectors of {a.width}"),
        ("cosine", f"[bold]{a.cosine_mean:.5f}[/] ± {a.cosine_stderr:.5f} mean, {a.cosine_min:.5f} lowest"),
        ("ranking", f"[bold]{a.spearman:.5f}[/] Spearman over the {a.pairs:,} pairs of sentences"),
    ]


def _divergence_rows(found: Evaluation, c: Comparison) -> list[tuple[str, str]]:
    rows = [("text", f"{plain(found.text)}: {c.tokens:,} tokens scored in {c.chunks} chunks of {c.n_ctx}")]
    rows.append(("perplexity", f"{c.ppl_candidate:.4f} ± {c.ppl_candidate_stderr:.4f}"))
    rows.append(("", f"[dim]{c.ppl_reference:.4f} ± {c.ppl_reference_stderr:.4f} the reference's[/]"))
    rows.append(("", f"ln ratio {c.ln_ratio:+.5f} ± {c.ln_ratio_stderr:.5f}"))
    rows.append(("KL", f"[bold]{c.kl_mean:.6f}[/] ± {c.kl_stderr:.6f} mean, in nats per token"))
    rows.append(("", f"median {c.kl_median:.6f}, 99 % {c.kl_p99:.6f}, max {c.kl_max:.6f}"))
    if found.floor:
        f = found.floor
        rows.append(("noise floor", f"{f.kl_mean:.1e} ± {f.kl_stderr:.0e}, top-1 {f.top1:.2%} [dim]({f.method})"))
    if found.jitter:
        j = found.jitter
        rows.append(("own noise", f"{j.kl_mean:.1e} ± {j.kl_stderr:.0e}, top-1 {j.top1:.2%} [dim]({j.method})"))
    rows.append(("top-1", f"[bold]{c.top1:.2%}[/] ± {c.top1_stderr:.2%} of tokens are the reference's choice"))
    rows.append(("Δp", f"mean {c.delta_p_mean:+.3%} ± {c.delta_p_mean_stderr:.3%}, RMS {c.delta_p_rms:.3%}"))
    return rows


def _flip_rows(found: Flips) -> list[tuple[str, str]]:
    changed = found.changed
    head = f"[bold]{len(changed)} of {len(found.answers)}[/] greedy answers changed in {found.max_tokens} tokens"
    rows = [("answers", head)]
    for answer in changed[:SHOWN]:
        rows.append(("", f"[bold]{plain(_one_line(answer.prompt, 70))}[/] [dim]from token {answer.at}"))
        rows += [("", f"[dim]{who}[/] {plain(text)}") for who, text in _sides(answer)]
    if len(changed) > SHOWN:
        rows.append(("", f"[dim]and {len(changed) - SHOWN} more: --json, or --keep and edgekit report"))
    return rows


def _sides(answer: Answer) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("was", _one_line(answer.reference, 90)), ("now", _one_line(answer.candidate, 90))


def _one_line(text: str, longest: int) -> str:
    """One line of printable characters: an answer may hold anything, escape sequences too."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    flat = " ".join(flat.split())
    return flat if len(flat) <= longest else flat[:longest] + "…"


def _task_rows(scores: Sequence[Score], reference: Sequence[Score]) -> list[tuple[str, str]]:
    other = {(s.task, s.metric): s for s in reference}
    rows: list[tuple[str, str]] = []
    for score in scores:
        text = f"{plain(score.task)} {plain(score.metric)} [bold]{_score(score)}[/]"
        if (score.task, score.metric) in other:
            text += f", the reference {_score(other[score.task, score.metric])}"
        rows.append(("" if rows else "tasks", f"{text} [dim]({score.samples} questions)"))
    return rows


def _score(score: Score) -> str:
    return f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")


def certification_screen(found: Certification) -> RenderableType:
    """Every check that held, and the divergence where it was measured."""
    rows = [
        ("artefact", f"[bold]{plain(found.artifact)}[/] [dim]({found.format})"),
        ("made from", plain(found.against)),
    ]
    lines = [plain(check.detail) for check in found.certificate.checks]
    against: Mapping[str, Any] = found.certificate.figures.get("against_source", {})
    if "kl_mean" in against:
        lines[-1] = f"KL divergence {against['kl_mean']:.5f} ± {against['kl_stderr']:.5f}, top-1 {against['top1']:.2%}"
    rows += [("proof" if i == 0 else "", f"[green]✓[/] {line}") for i, line in enumerate(lines)]
    return panel(rows, "certified")


# --- files, machines, targets ----------------------------------------------------------------------------------------


def inspection_screen(
    found: Inspection | OnnxInspection, *, tensors: bool = False, checked: bool = False
) -> RenderableType:
    """Header, formats and metadata of a GGUF; of an ONNX graph what OnnxInspection tells."""
    from rich.console import Group

    from edgekit.inspection import OnnxInspection

    sealed = [("sealed", "[green]✓[/] every file of the manifest has its sha256")] if checked else []
    if isinstance(found, OnnxInspection):
        shown = panel([*((what, plain(text)) for what, text in found.rows()), *sealed], "inspect")
        stored = [(t.name, t.shape, t.dtype, t.nbytes, t.file or "-") for t in found.file.initializers.values()]
        return Group(shown, table_of_tensors(stored, "file")) if tensors else shown
    rows = [
        ("file", f"[bold]{plain(str(found.path))}"),
        (
            "size",
            f"[bold]{show_bytes(found.nbytes)}[/] [dim]({found.nbytes:,} bytes)[/], GGUF version {found.file.version}",
        ),
        ("weights", f"{show_count(found.parameters)} at {found.bits_per_weight:.2f} bits per weight"),
        ("preset", found.preset),
    ]
    parts = found.bytes_by_format.items()
    rows.append(("formats", "\n".join(f"{k:<8} {n:>4} tensors  {show_bytes(b):>10}" for k, (n, b) in parts)))
    rows += sealed
    rows += [(plain(key), plain(_brief(value))) for key, value in found.metadata(longest=5).items()]
    shown = panel(rows, "inspect")
    if not tensors:
        return shown
    listed = [(t.name, t.shape, t.type, t.nbytes, f"{t.offset:,}") for t in found.file.tensors.values()]
    return Group(shown, table_of_tensors(listed, "offset"))


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['length']:,} values: {', '.join(map(repr, value['first']))}, …"
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]}… ({len(text):,} characters)"


def diagnosis_screen(findings: Sequence[Finding]) -> RenderableType:
    """One line for each finding, with the fix where something is wrong."""
    rows = []
    for item in findings:
        mark = "[green]✓[/]" if item.ok else "[bold red]✗[/]"
        fix = f"\n[cyan]{plain(item.fix)}" if item.fix else ""
        rows.append((item.name, f"{mark} {plain(item.detail)}{fix}"))
    return panel(rows, "doctor")


def targets_table(found: Sequence[Target]) -> Table:
    """One row for each device."""
    from rich.table import Table

    table = Table(header_style="bold", box=_lines())
    table.add_column("target", no_wrap=True)
    if _wide():
        table.add_column("device", no_wrap=True)
    for column in ("RAM GiB", "usable", "GB/s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("backend", no_wrap=True)
    table.add_column("fast formats", min_width=24)
    for target in found:
        row = target_row(target)
        ram = " / ".join(f"{gib:g}" for gib in row["ram_gib"]) or "?"
        usable = show_bytes(row["usable_bytes"]) if row["usable_bytes"] else "?"
        bandwidth = f"{row['bandwidth_gb_s']:.0f}" if row["bandwidth_gb_s"] else "?"
        names = (row["name"], plain(row["title"])) if _wide() else (row["name"],)
        table.add_row(*names, ram, usable, bandwidth, row["backend"], ", ".join(row["fast"]))
    return table


def target_row(target: Target) -> dict[str, Any]:
    """The short form of a target: sizes it is sold with, what a model may take, theoretical bandwidth."""
    return {
        "name": target.name,
        "title": target.title,
        "ram_gib": list(target.ram.gib) if target.ram else [],
        "usable_bytes": target.usable_bytes,
        "bandwidth_gb_s": target.bandwidth.value if target.bandwidth else None,
        "backend": target.backend[0].name,
        "fast": list(target.fast),
    }


def target_screen(target: Target) -> RenderableType:
    """Every fact of a device with its source."""
    rows = [("name", f"[bold]{plain(target.name)}"), ("family", target.family)]
    usable = show_bytes(target.usable_bytes) if target.usable_bytes else "unknown"
    rows.append(("usable", f"{usable} for file, KV cache and buffers [dim]({plain(target.usable_rule.source)})"))
    rows.append(("context", f"{target.context} tokens by default"))
    for path, fact in target.facts():
        values = fact.model_dump(mode="json", exclude_none=True, exclude={"source", "date", "note"})
        shown = ", ".join(f"{k} {_fact_value(v)}" for k, v in values.items() if v not in ([], "", {}))
        date = f", read {fact.date}" if fact.date else ""
        note = f"\n[dim]{plain(fact.note)}" if fact.note else ""
        rows.append((path, f"{plain(shown)} [dim]({plain(fact.source)}{date})[/]{note}"))
    lists = {"fast": target.fast, "slow": target.slow, "flags": target.flags, "notes": target.notes}
    for label, entries in lists.items():
        if entries:
            rows.append((label, plain(("\n" if label == "notes" else ", ").join(entries))))
    return panel(rows, plain(target.title))


def _fact_value(value: Any) -> str:
    if isinstance(value, list):
        numbers = all(isinstance(v, int | float) for v in value)
        return (" to " if len(value) == 2 else " / ").join(f"{v:g}" for v in value) if numbers else " ".join(value)
    if isinstance(value, dict):
        return " ".join(f"{k} {v:g}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def host_screen(found: Host, bandwidth: Bandwidth, matched: str | None) -> RenderableType:
    """This machine as detected."""
    cores = f"{found.physical_cores or '?'} physical, {found.logical_cores or '?'} logical"
    rows = [
        ("system", f"{found.os} on {found.machine}" + (f", {plain(found.board)}" if found.board else "")),
        ("CPU", plain(found.cpu or "unknown")),
        ("cores", cores + (f", {found.allowed_cores} allowed" if found.allowed_cores else "")),
        ("features", ", ".join(found.isa) or "none that matter here"),
        ("RAM", show_bytes(found.ram_bytes) if found.ram_bytes else "unknown"),
        ("bandwidth", f"[bold]{bandwidth.gb_s:.1f} GB/s[/] [dim]({bandwidth.method}, {bandwidth.threads} threads)"),
        ("target", f"[bold cyan]{matched}" if matched else "no shipped target: use [bold cyan]--target host"),
    ]
    return panel(rows, "this machine")


def recipes_table(found: Sequence[Recipe]) -> Table:
    from rich.table import Table

    table = Table(header_style="bold", box=_lines())
    for column in ("recipe", "what it makes", "quant", "stages"):
        table.add_column(column)
    for recipe in found:
        stages = ", ".join(stage.name for stage in recipe.stage) or "none"
        table.add_row(recipe.name, plain(recipe.title), recipe.export.quant, stages)
    return table


def plain(text: str) -> str:
    """Text from outside, so that its brackets are not taken for markup."""
    from rich.markup import escape

    return escape(text)
