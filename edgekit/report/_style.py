"""The style sheet of the page: the fonts of the reader's system, and two sets of colours."""

from __future__ import annotations

_LIGHT = """
--paper:#f7f7f5;--card:#fff;--ink:#1c1e21;--dim:#5c6269;--line:#dfe1e4;--accent:#1f5fae;--good:#1b7a43;--warn:#8a5a00;
--preset:#68707a;--random:#a2482f;--m0:#1f5fae;--m1:#8db4de;--m2:#128a8a;--m3:#c98a1b;--m4:#9aa1a9;--band:#c9daef;
--h0:#e9f1fa;--h1:#cfe0f3;--h2:#afcbea;--h3:#86aede;--h4:#5a8dcb;--h5:#356fb3;--h6:#1f5392;--h7:#12386b;
--o0:#1c1e21;--o1:#1c1e21;--o2:#1c1e21;--o3:#10151c;--o4:#fff;--o5:#fff;--o6:#fff;--o7:#fff;
"""

_DARK = """
--paper:#131518;--card:#1b1e22;--ink:#e7e9ec;--dim:#a0a7af;--line:#33383e;--accent:#78aeea;--good:#5fc58a;--warn:#e0b054;
--preset:#9aa3ad;--random:#e08a6d;--m0:#5c97da;--m1:#2f5480;--m2:#35aeae;--m3:#d9a441;--m4:#6f767e;--band:#2b4666;
--h0:#17283c;--h1:#1b3554;--h2:#214670;--h3:#2a5b91;--h4:#3a74b3;--h5:#5a93d0;--h6:#86b4e4;--h7:#bcd8f5;
--o0:#dfe7f0;--o1:#e3eaf2;--o2:#e8eef5;--o3:#fff;--o4:#fff;--o5:#0b1420;--o6:#0b1420;--o7:#0b1420;
"""

_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 3rem}
header{padding:.5rem 0 1rem}
h1{font-size:1.9rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
header>p{margin:.35rem 0 0;color:var(--dim);overflow-wrap:anywhere}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1.1rem 1.25rem;margin:0 0 1rem}
h2{font-size:1.1rem;margin:0 0 .25rem}
h4{font-size:.8rem;color:var(--dim);font-weight:600;margin:0 0 .25rem}
.sub{margin:0 0 .75rem;color:var(--dim);font-size:.9rem;overflow-wrap:anywhere}
.note{margin:.6rem 0 0;color:var(--dim);font-size:.9rem}
ul{list-style:none;margin:0;padding:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;margin-top:1.1rem}
.tiles li{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:.7rem .9rem}
.tiles span,.tiles small{display:block;color:var(--dim);font-size:.82rem}
.tiles b{font-size:1.3rem;font-weight:650}
.checks li{padding:.3rem 0 .3rem 1.6rem;position:relative}
.checks li::before{content:"✓";position:absolute;left:0;color:var(--good);font-weight:700}
.checks span{color:var(--dim);overflow-wrap:anywhere}
.warnings{margin-top:.6rem}
.warnings li{padding:.2rem 0 .2rem 1.6rem;position:relative;overflow-wrap:anywhere}
.warnings li::before{content:"!";position:absolute;left:.25rem;color:var(--warn);font-weight:700}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem;margin-top:.5rem}
th,td{text-align:left;padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--dim);font-weight:600;font-size:.82rem;white-space:nowrap}
td{overflow-wrap:anywhere;min-width:4.5rem;max-width:28rem;font-variant-numeric:tabular-nums}
tr:last-child td{border-bottom:0}
.n{text-align:right;white-space:nowrap}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:.6rem 0 0;font-size:.88rem;color:var(--dim)}
.legend li{display:flex;align-items:center;gap:.45rem}
.key{width:14px;height:14px;border-radius:3px;border:1px solid var(--line)}
.dot{width:12px;height:12px;border-radius:50%}
.dot.preset{border:2px solid var(--preset);background:var(--card)}
.dot.ours{background:var(--accent)}
.dot.random{border-radius:0;background:linear-gradient(45deg,#0000 42%,var(--random) 42% 58%,#0000 58%),
linear-gradient(-45deg,#0000 42%,var(--random) 42% 58%,#0000 58%)}
.ring{width:16px;height:16px;border-radius:50%;border:2px solid var(--good)}
svg{display:block;width:100%;height:auto;font-size:12px}
svg.bar{height:26px;margin-top:.6rem;border-radius:5px}
svg text{fill:var(--ink)}
svg .tick{fill:var(--dim);font-size:11.5px;font-variant-numeric:tabular-nums}
svg .name{fill:var(--dim)}
svg .strong{font-weight:700}
svg .point{paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
.presets{fill:none;stroke:var(--preset);stroke-width:1.5;stroke-dasharray:5 4}
.leader{stroke:var(--dim);stroke-width:.8}
.axis{stroke:var(--dim)}
.grid{stroke:var(--line)}
.error{stroke-width:1.5;fill:none}
.error.preset{stroke:var(--preset)}.error.ours{stroke:var(--accent)}.error.random{stroke:var(--random)}
.mark{stroke-width:2;fill:var(--card)}
.mark.preset{stroke:var(--preset)}
.mark.ours{fill:var(--accent);stroke:var(--card)}
.mark.random{stroke:var(--random);fill:none}
.shipped{fill:none;stroke:var(--good);stroke-width:2}
.empty{fill:var(--line)}
rect.band{fill:var(--band)}.key.band{background:var(--band)}
.middle{stroke:var(--accent);stroke-width:2;stroke-dasharray:3 2}
details.pair{border-top:1px solid var(--line);padding:.45rem 0}
summary{cursor:pointer;overflow-wrap:anywhere}
summary small{color:var(--dim)}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:1rem;margin:.6rem 0 .4rem}
.sides p{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:.85rem/1.5 ui-monospace,Menlo,Consolas,monospace}
.sides i{font-style:normal;color:var(--dim)}
details.whole{margin:1.5rem 0}
details.whole>summary{font-size:1.15rem;font-weight:650;padding:.4rem 0}
footer{color:var(--dim);font-size:.85rem;margin-top:1.5rem}
code{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.95em}
@media(max-width:34rem){.sides{grid-template-columns:1fr}h1{font-size:1.5rem}section{padding:.9rem .85rem}
.tiles{grid-template-columns:1fr 1fr}.tiles b{font-size:1.1rem}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""


def _steps() -> str:
    heat = "".join(f"rect.h{i}{{fill:var(--h{i})}}.key.h{i}{{background:var(--h{i})}}" for i in range(8))
    over = "".join(f"svg text.on{i}{{fill:var(--o{i});font-size:11px}}" for i in range(8))
    memory = "".join(f"rect.m{i}{{fill:var(--m{i})}}.key.m{i}{{background:var(--m{i})}}" for i in range(5))
    return heat + over + memory


STYLE = f":root{{{_LIGHT}}}\n@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n{_RULES}{_steps()}"
