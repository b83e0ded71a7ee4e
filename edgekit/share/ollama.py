"""The Modelfile that `ollama create` imports. Knows Ollama's syntax; starts nothing and needs no Ollama.

Ollama guesses a template from the file by comparing it with those that it knows, and falls back on the bare prompt. So
the chat template is written out as Go text, where it is simple enough to be derived and proven equal.
"""

from __future__ import annotations

from edgekit import chat


def modelfile(file_name: str, template: chat.Template | None, context: int, *, adds_bos: bool = True) -> str:
    """Text of a Modelfile beside `file_name`. `adds_bos`: the vocabulary says that a BOS is put in front."""
    lines = [f"FROM ./{file_name}", f"PARAMETER num_ctx {context}"]
    shape = template.shape() if template else None
    if shape is None:
        why = "its turns are more than fixed texts" if template else "the model has none"
        lines += [f"# No TEMPLATE here ({why}): Ollama looks at the chat template in the file."]
    else:
        lines += [f'TEMPLATE """{shape.to_go_template(bos=not adds_bos)}"""']
        lines += [f"PARAMETER stop {_quoted(text)}" for text in shape.stop]
        if shape.dated:
            lines.append("# The template writes the date; this one has the day it was made.")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
