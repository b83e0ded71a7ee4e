"""What a person sees of an ONNX plan and of a finished ONNX artefact. Computes no figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.console import headroom, memory_bar, panel, plain, rate, table_of_tensors
from edgekit.onnx_planning import TEXT2TEXT
from edgekit.units import show_bytes, show_count

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from edgekit.onnx_planning import OnnxPlan
    from edgekit.pipeline import OnnxConversion
    from edgekit.target import Target


def plan_screen(plan: OnnxPlan, target: Target, name: str, learning: str = "") -> RenderableType:
    """Everything that was decided, for one target. `learning`: what converting does beside writing, in a line."""
    rows = [("task", plan.task), ("files", _files(plan)), ("formats", _formats(plan)), *_memory(plan, target)]
    rows += [("to build", f"about {show_bytes(plan.build_bytes)} of memory on the machine that exports")]
    rows += [("", plain(learning))] if learning else []
    rows += [("speed", speed_line(plan)), ("chosen", f"{plan.variant.name}: {plan.why}")]
    command = f"edgekit convert {plain(name)} --target {plan.target} --format onnx -q {plan.variant.name}"
    rows += [("next", f"[bold cyan]{command}")]
    return panel(rows, plain(f"plan: {name} on {target.title}, ONNX"))


def conversion_screen(done: OnnxConversion) -> RenderableType:
    """What was made, how big, what it needs, how good, and the next command."""
    plan, target = done.plan, done.target
    rows: list[tuple[str, str]] = []
    if done.artifact:
        rows.append(("made", f"[bold]{plain(str(done.artifact.model))}"))
    rows += [("size", _files(plan)), ("quant", f"{plan.variant.name} [dim]({plan.variant.title}; {plan.why})")]
    rows += _memory(plan, target)
    rows.append(("speed", speed_line(plan)))
    rows += _gate(done)
    checks = done.certificate.checks if done.certificate else ()
    rows += [("proof" if i == 0 else "", f"[green]✓[/] {plain(c.detail)}") for i, c in enumerate(checks)]
    if done.artifact and not checks:
        rows.append(("proof", "[yellow]not verified (--verify none)"))
    return panel([*rows, *_next(done)], plain(f"{done.name} for {target.title}, ONNX"))


def tensor_table(plan: OnnxPlan) -> Table:
    """Every weight of a plan."""
    return table_of_tensors([(s.name, s.shape, s.format, s.nbytes, s.place) for s in plan.stored], "place")


def speed_line(plan: OnnxPlan) -> str:
    """Forecast speed of writing, or of an encoder's reading, or why there is none."""
    f = plan.forecast
    if not plan.shape.causal and f.prefill_tok_s:
        return f"forecast [bold]{rate(f.prefill_tok_s)} tok/s[/] read [dim]({f.backend}; edgekit bench measures)"
    if f.decode_tok_s is None or not plan.shape.causal:
        return f"[dim]no forecast{': ' + plain(f.basis) if f.basis else ''}; edgekit bench measures"
    low, high = f.decode_range or (0.0, 0.0)
    return (
        f"forecast [bold]{rate(f.decode_tok_s)} tok/s[/] decode ({rate(low)} to {rate(high)}) "
        f"[dim]({f.backend}; edgekit bench measures)"
    )


def _files(plan: OnnxPlan) -> str:
    return (
        f"[bold]{show_bytes(plan.file_bytes)}[/] [dim]({plan.data_bytes:,} bytes of weights)[/], "
        f"{show_count(plan.parameters)} parameters at {plan.bits_per_weight:.2f} bits per weight"
    )


def _formats(plan: OnnxPlan) -> str:
    return ", ".join(f"{name} {show_bytes(n)}" for name, n in plan.bytes_by_format.items())


def _memory(plan: OnnxPlan, target: Target) -> list[tuple[str, str]]:
    memory = plan.memory
    length = f"{plan.context} tokens of context" if plan.shape.causal else f"texts of up to {plan.context} tokens"
    if plan.task == TEXT2TEXT:
        length = f"{plan.context} tokens read and as many written"
    rows = [("memory", f"[bold]{show_bytes(memory.total)}[/] at {length}")]
    if bar := memory_bar(memory):
        rows.append(("", f"{bar} {headroom(memory, target)}"))
    return rows


def _gate(done: OnnxConversion) -> list[tuple[str, str]]:
    """Every candidate with its KL divergence, the one that is shipped marked; and how many answers it changes."""
    if done.outcome is None:
        return []
    rows = []
    for i, c in enumerate(done.candidates):
        line = f"{c.kl:.6f} ± {c.kl_stderr:.6f}  {show_bytes(c.nbytes)}  {plain(c.name)}"
        rows.append(("gate" if i == 0 else "", f"[bold green]{line}  shipped[/]" if c.shipped else f"[dim]{line}"))
    text = f"KL divergence in nats a token on {done.held_out:,} held-out predictions"
    rows.append(("", f"[dim]{text} of {plain(done.outcome.text)}"))
    if changed := done.outcome.flips:
        answers = f"{len(changed.changed)} of {len(changed.answers)} greedy answers changed"
        rows.append(("", f"[dim]{answers}; edgekit report shows them, and other sizes"))
    return rows


def _next(done: OnnxConversion) -> list[tuple[str, str]]:
    if not done.artifact:
        return [("next", "[bold cyan]the same without --dry-run makes it")]
    place = plain(str(done.out))
    rows = [("next", f"[bold cyan]edgekit bench {place}")]
    if done.plan.shape.causal:
        rows = [("next", f'[bold cyan]edgekit run {place} "Hello"'), ("", f"[cyan]edgekit bench {place}")]
        if done.plan.task != TEXT2TEXT:
            rows.append(("", f'[cyan]python -c "import onnxruntime_genai as og; og.Model({str(done.out)!r})"'))
    return rows
