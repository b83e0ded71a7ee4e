"""Runs a chat template as transformers does, but as what it is: somebody else's program.

Knows Jinja and bounds; knows no model. The language (trim_blocks, lstrip_blocks, loop controls, `generation` blocks,
`tojson`, `raise_exception`, `strftime_now`) is that of transformers' `utils/chat_template_utils.py`, version 5.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from types import FrameType
from typing import Any

from edgekit.errors import EdgekitError

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 8 << 20
MAX_STEPS = 200_000
"""How many numbers all calls of `range` together may give in one rendering."""
MAX_SECONDS = 5.0

Clock = Callable[[], datetime]
Trace = Callable[[FrameType, str, Any], Any]


class TemplateFailed(EdgekitError):
    """Raised when a chat template is not valid, refuses its input, or oversteps its bounds. Names the line."""


def render(template: str, variables: Mapping[str, Any], clock: Clock | None) -> str:
    """The text that `template` makes of `variables`. Without a clock, `strftime_now` is not defined.

    Raises TemplateFailed.
    """
    import jinja2

    if len(template) > MAX_TEMPLATE_CHARS:
        raise TemplateFailed(f"the chat template has {len(template)} characters, more than {MAX_TEMPLATE_CHARS}")
    try:
        compiled = _compiled(template)
    except jinja2.TemplateSyntaxError as e:
        raise TemplateFailed(f"chat template, line {e.lineno}: {e.message}") from None
    except (RecursionError, MemoryError, OverflowError, SyntaxError) as e:
        raise TemplateFailed(f"the chat template does not compile: {type(e).__name__}") from None
    names = dict(variables) | {"range": _counted_range()}
    if clock is not None:
        names["strftime_now"] = lambda form: clock().strftime(form)
    try:
        with _deadline(time.monotonic() + MAX_SECONDS):
            return _collect(compiled.generate(names))
    except TemplateFailed:
        raise
    except (*_FAILURES, jinja2.TemplateError) as e:
        line = _line_of(e)
        raise TemplateFailed(f"chat template{f', line {line}' if line else ''}: {e or type(e).__name__}") from None


_FAILURES = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


def _collect(pieces: Iterator[str]) -> str:
    out, size = [], 0
    for piece in pieces:
        out.append(piece)
        size += len(piece)
        if size > MAX_OUTPUT_CHARS:
            raise _too_long()
    return "".join(out)


def _too_long() -> TemplateFailed:
    return TemplateFailed(f"the chat template writes more than {MAX_OUTPUT_CHARS} characters", "look at the template")


def _counted_range() -> Callable[..., range]:
    left = MAX_STEPS

    def counted(*args: int) -> range:
        nonlocal left
        numbers = range(*args)
        left -= len(numbers)
        if left < 0:
            raise TemplateFailed(f"the chat template counts further than {MAX_STEPS}", "look at the template")
        return numbers

    return counted


@contextmanager
def _deadline(end: float) -> Iterator[None]:
    """Stops Python code that runs longer, line by line: a template is a loop nest that somebody else wrote."""
    before = sys.gettrace()

    def watch(frame: FrameType, event: str, arg: Any) -> Trace:
        if time.monotonic() > end:
            raise TemplateFailed(f"the chat template runs longer than {MAX_SECONDS:.0f} s", "look at the template")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _line_of(error: BaseException) -> int | None:
    """The template's line in a traceback: Jinja rewrites the frames of compiled templates to it."""
    line, at = None, error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename in ("<template>", "<unknown>"):
            line = at.tb_lineno
        at = at.tb_next
    return line


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """`{% generation %}` marks what the model wrote, for training; it renders as its body."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own way to declare it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Joins(NodeTransformer):
        """`a ~ b` has no hook of its own: it becomes a filter that has a bound."""

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            parts = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(parts, "_join", [], [], None, None, lineno=node.lineno)

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree: nodes.Template = Joins().visit(super()._parse(source, name, filename))
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            result = super().call_binop(context, operator, left, right)
            if isinstance(result, str) and len(result) > MAX_OUTPUT_CHARS:
                raise _too_long()
            return result

    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters["_join"] = _join
    for name in ("center", "format", "indent"):
        environment.filters[name] = _narrow(environment.filters[name])

    def refuse(message: object) -> None:
        raise jinja2.TemplateError(str(message))

    environment.globals["raise_exception"] = refuse
    del environment.globals["lipsum"]  # prints random words
    return environment


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for text, times in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(times, int) and len(text) * times > MAX_OUTPUT_CHARS:
                raise _too_long()
    if operator == "%" and isinstance(left, str):
        _no_wide_fields(left)
    if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > 1 << 16:
            raise TemplateFailed("the chat template computes with numbers of more than 65,536 bits")


def _no_wide_fields(form: str) -> None:
    if any(len(run) > 5 for run in _digit_runs(form)):
        raise _too_long()


def _digit_runs(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


def _narrow(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, but no width that would fill the memory."""
    import functools

    @functools.wraps(filter_)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and value > 1 << 16:
                raise _too_long()
        for value in args:
            if isinstance(value, str) and "%" in value:
                _no_wide_fields(value)
        return filter_(*args, **kwargs)

    return bounded


def _join(parts: Sequence[Any]) -> str:
    texts = [str(p) for p in parts]
    if sum(map(len, texts)) > MAX_OUTPUT_CHARS:
        raise _too_long()
    return "".join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's HTML escapes, and with the options that templates use."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
