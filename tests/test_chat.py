"""Chat templates: rendered as transformers renders them, bounded, and described as shapes that prove equal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from edgekit import chat
from edgekit.chat import ChatShape, Template, TemplateFailed
from edgekit.errors import EdgekitError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the <sky> does & how.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "où"}}},
    },
}
TALKS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Hello \n"}],
    [
        {"role": "user", "content": "One {{ brace }} <b>&amp;</b>"},
        {"role": "assistant", "content": "Two\n\n"},
        {"role": "user", "content": "Three 👍"},
    ],
    [
        {"role": "system", "content": "Rules\n1. x"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "because"},
    ],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "assistant", "content": "I begin."}, {"role": "user", "content": "Then I go on."}],
]


def real_templates(data: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(where, template, special tokens) of everything in the test data."""
    folders = [*sorted((data / "tokenizers").iterdir()), *sorted((data / "models").iterdir())]
    for folder in folders:
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        specials = {}
        for role in ("bos", "eos", "unk", "pad"):
            entry = config.get(f"{role}_token")
            text = entry.get("content") if isinstance(entry, dict) else entry
            if text:
                specials[f"{role}_token"] = text
        found = {p.name: p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.jinja"))}
        if isinstance(config.get("chat_template"), str):
            found["tokenizer_config.json"] = config["chat_template"]
        for name, text in found.items():
            yield f"{folder.name}/{name}", text, specials


def test_templates_render_as_in_transformers(test_data: Path) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    seen = rendered = refused = 0
    for where, template, specials in real_templates(test_data):
        seen += 1
        for talk in TALKS:
            for tools in (None, [WEATHER]):
                for generation in (True, False):
                    arguments = {"tools": tools, "add_generation_prompt": generation, **specials}
                    try:
                        (expected,), _ = utils.render_jinja_template([talk], chat_template=template, **arguments)
                    except Exception:  # noqa: BLE001 - whatever a template makes of what it does not like
                        with pytest.raises(TemplateFailed):
                            chat.render(template, talk, **arguments)
                        refused += 1
                        continue
                    assert chat.render(template, talk, **arguments) == expected, where
                    rendered += 1
    assert seen >= 14
    assert rendered > 200 and refused > 0


def test_errors_name_the_line(test_data: Path) -> None:
    with pytest.raises(TemplateFailed, match="line 3"):
        chat.render("{% if messages %}\nx\n{% endfor %}", TALKS[0])
    with pytest.raises(TemplateFailed, match=r"line 2: .*no system"):
        chat.render("a\n{{ raise_exception('no system') }}", TALKS[0])
    with pytest.raises(TemplateFailed, match="line 4"):
        chat.render("\n\n\n{{ messages[0]['content'] + 1 }}", TALKS[0])
    with pytest.raises(TemplateFailed, match=r"line 1: .*missing"):
        chat.render("{{ missing.thing }}", TALKS[0])


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 999999999 }}",
        "{{ [1] * 999999999 }}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ 'a' | center(999999999) }}",
        "{{ 'a\nb' | indent(999999999) }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{" * 100_000 + "%" * 100_000,
        "(" * 5000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "x" * (2 << 20),
        "{% include 'x' %}",
        "{% import 'os' as os %}",
    ],
    ids=range(21),
)
def test_hostile_templates_end_soon_and_in_an_error(template: str) -> None:
    started = time.monotonic()
    try:
        text = chat.render(template, TALKS[0])
    except EdgekitError as e:
        assert str(e)
    else:
        assert len(text) < 200_000
    assert time.monotonic() - started < 20


def test_a_loop_without_an_end_is_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.chat.sandbox.MAX_SECONDS", 0.3)
    nest = "{% for a in messages[0].content %}" * 6 + "{% endfor %}" * 6
    before = sys.gettrace()
    with pytest.raises(TemplateFailed, match="longer than"):
        chat.render(nest, [{"role": "user", "content": "x" * 200}])
    assert sys.gettrace() is before


def test_what_the_language_has() -> None:
    def show(template: str, **names: Any) -> str:
        return chat.render(template, TALKS[0], **names)

    assert show("{{ x | tojson }}", x={"ü": "<&>'", "b": [1, None]}) == '{"ü": "<&>\'", "b": [1, null]}'
    assert show("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}") == '{\n "a": 2,\n "b": 1\n}'
    assert show("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert show("a{% generation %}b{{ x }}{% endgeneration %}c", x=1) == "ab1c"
    assert show("  {% if true %}\n  a\n  {% endif %}\n b") == "  a\n b"
    assert show("{{ 'a' ~ 1 ~ none }}{{ 'x' * 3 }}{{ 2 + 3 }}{{ '%02d' % 7 }}") == "a1Nonexxx507"
    assert show("{{ strftime_now('%Y') }}", clock=lambda: datetime(1999, 1, 2)) == "1999"
    assert show("{{ bos_token }}|{{ nothing }}|{{ tools is none }}", bos_token="<s>") == "<s>||True"
    reasoning = [{"role": "assistant", "content": "c", "reasoning": "r"}]
    assert chat.render("{{ messages[0].thinking }}{{ messages[0].reasoning_content }}", reasoning) == "rr"


def test_a_template_carries_its_special_tokens() -> None:
    template = Template(
        "{{ bos_token }}{{ messages[0].content }}{% if not add_generation_prompt %}!{% endif %}", {"bos_token": "<s>"}
    )
    assert template.render(TALKS[0]) == "<s>Hello!"
    assert template.render(TALKS[0], add_generation_prompt=False, bos_token="<b>") == "<b>Hello!!"


# --- shapes ----------------------------------------------------------------------------------------------------------

SHAPELESS = {"gpt-oss/chat_template.jinja"}


def test_shapes_of_real_templates(test_data: Path) -> None:
    shapes = {}
    for where, template, specials in real_templates(test_data):
        shapes[where] = chat.probe(template, **specials)
    qwen = shapes["qwen2.5/tokenizer_config.json"]
    assert qwen is not None
    assert qwen.default_system == "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert qwen.system_before == "<|im_start|>system\n" and qwen.stop == ("<|im_end|>",)
    assert not qwen.trims and not qwen.merges_system and not qwen.dated
    gemma = shapes["gemma-3/tokenizer_config.json"]
    assert gemma is not None
    assert gemma.merges_system and gemma.trims and gemma.bos == "<bos>" and gemma.stop[0] == "<end_of_turn>"
    llama = shapes["llama-3.2/tokenizer_config.json"]
    assert llama is not None
    assert "Today Date: 26 Jul 2024" in llama.opening and not llama.dated and llama.trims
    smollm = shapes["smollm3/chat_template.jinja"]
    assert smollm is None or smollm.dated
    assert sum(s is not None for s in shapes.values()) >= 12


def test_a_shape_renders_what_the_template_renders(test_data: Path) -> None:
    talk = [
        {"role": "user", "content": 'x {{ "y" }} """z"""'},
        {"role": "assistant", "content": "é\n\n- 1"},
        {"role": "user", "content": "<b>"},
    ]
    for _where, template, specials in real_templates(test_data):
        shape = chat.probe(template, **specials)
        if shape is None or shape.dated:
            continue
        assert shape.render(talk) == chat.render(template, talk, clock=None, **specials)
        if shape.system_before is not None:
            with_system = [{"role": "system", "content": "S"}, *talk]
            assert shape.render(with_system) == chat.render(template, with_system, clock=None, **specials)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",  # counts its turns
        "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}",  # changes what was said
        "{{ messages[-1].content }}",  # forgets
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",  # repeats
        "{% for m in messages %}<{{ m.content | length }}>{{ m.content }}</>{% endfor %}",  # measures
        "{{ raise_exception('never') }}",
        "{% for m in messages %}{% if 'x' in m.content %}!{% endif %}<u>{{ m.content }}</u>{% endfor %}",
    ],
)
def test_templates_without_a_shape(template: str) -> None:
    assert chat.probe(template) is None


def test_a_shape_refuses_other_conversations() -> None:
    shape = chat.probe(CHATML)
    assert shape is not None
    for talk in ([], TALKS[4], TALKS[5], TALKS[3]):
        with pytest.raises(EdgekitError, match="conversation"):
            shape.render(talk)


# --- Ollama ----------------------------------------------------------------------------------------------------------

GO = """package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template, System string; Messages []*Message }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	var out []string
	for _, c := range cases {
		file, _ := os.CreateTemp("", "out")
		t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		values := map[string]any{"System": c.System, "Messages": c.Messages, "Response": ""}
		if err := t.Execute(file, values); err != nil { panic(err) }
		file.Close()
		text, _ := os.ReadFile(file.Name())
		os.Remove(file.Name())
		out = append(out, string(text))
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


def in_go(cases: list[tuple[ChatShape, bool, list[dict[str, str]]]], folder: Path) -> list[str]:
    """What Go's text/template makes of the shapes, fed as ollama's template.go feeds it."""
    if shutil.which("go") is None:
        pytest.skip("no Go compiler to run the template with")
    (folder / "main.go").write_text(GO)
    request = []
    for shape, bos, talk in cases:
        system = "\n\n".join(m["content"] for m in talk if m["role"] == "system")
        messages = [{"Role": m["role"], "Content": m["content"]} for m in talk]
        request.append({"Template": shape.to_go_template(bos=bos), "System": system, "Messages": messages})
    done = subprocess.run(
        ["go", "run", "main.go"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        env={
            "PATH": "/usr/local/go/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "GOFLAGS": "-mod=mod",
            "GO111MODULE": "off",
        },
    )
    assert done.returncode == 0, done.stderr
    answer: list[str] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
def test_go_templates_render_what_the_jinja_renders(test_data: Path, tmp_path: Path) -> None:
    talks = [
        [{"role": "user", "content": "One"}],
        [
            {"role": "user", "content": "One {{ x }}"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "<3>"},
        ],
        [{"role": "system", "content": "S"}, {"role": "user", "content": "One"}],
        [
            {"role": "system", "content": "Be\nbrief."},
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "3"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "5"},
        ],
    ]
    odd = "{% for m in messages %}"
    odd += '{{ \'{{"""`}}\' }}{{ m.role }}{{ "\\n" }}{{ m.content }}{{ "}}" }}{% endfor %}{{ "{{>" }}'
    templates = [*real_templates(test_data), ("odd", odd, {})]
    cases, expected = [], []
    for _where, template, specials in templates:
        shape = chat.probe(template, **specials)
        if shape is None:
            continue
        for talk in talks:
            if talk[0]["role"] == "system" and shape.system_before is None:
                continue
            for bos in (True, False):
                cases.append((shape, bos, talk))
                text = shape.render(talk)
                expected.append(text if bos else text.removeprefix(shape.bos))
    assert len(cases) > 80
    assert in_go(cases, tmp_path) == expected
