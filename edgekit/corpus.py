"""Texts that tell tokenizers apart, and prose for a quick perplexity. Written for this project; knows no tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final, Protocol

_SCRIPTS: Final = (
    "The quick brown fox jumps over the lazy dog.",
    "Sphinx of black quartz, judge my vow!",
    "café naïve résumé façade Zürich Ångström smörgåsbord",
    "cafe\u0301 nai\u0308ve re\u0301sume\u0301 A\u030angstro\u0308m",
    "e\u0301\u0302\u0303 stacked marks, a\u0323\u0307 and o\u031b\u0301",
    "ÉCOLE école ÉcoleÉCOLE ÜberGRÖSSE straßeSTRASSE",
    "Đặng Thị Hồng sống ở thành phố Hồ Chí Minh.",
    "Zażółć gęślą jaźń; příliš žluťoučký kůň; árvíztűrő tükörfúrógép",
    "İstanbul'da ılık bir gün, IĞDIR ve ığdır",
    "Þetta er íslenska með ð og æ.",
    "ﬁne ﬂow oﬀer ½ ¾ ² ³ № ™ ℃ Ⅷ ㎏",
    "Ｆｕｌｌｗｉｄｔｈ　ｔｅｘｔ　１２３",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ἀρχιμήδης ᾠδή",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Їжак, ґудзик, єнот; Ѓорѓи; Љубљана",
    "МОСКВАмосква СанктПетербург XVIII век",
    "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت",
    "العربية ٠١٢٣٤٥٦٧٨٩ ۰۱۲۳ و English معًا",
    "שלום עולם, מה שלומך? שָׁלוֹם",
    "हिन्दी में एक छोटा वाक्य है।  १२३४",
    "क्षत्रिय ज्ञान श्री द्ध्य",
    "বাংলা ভাষায় লেখা একটি বাক্য।",
    "தமிழ் மொழி மிகவும் பழமையானது.",
    "తెలుగు కన్నడ ಕನ್ನಡ മലയാളം ગુજરાતી ਪੰਜਾਬੀ",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ ๑๒๓",
    "ລາວ ខ្មែរ မြန်မာ བོད་ཡིག སිංහල",
    "我能吞下玻璃而不伤身体。",
    "漢字かな交じり文とカタカナ、ｶﾀｶﾅ。",
    "東京は2024年に30度を超えた。価格は1,234円です",
    "한국어는 띄어쓰기가 있다. 가나다라",
    "\u1112\u1161\u11ab\u1100\u1173\u11af decomposed Hangul",
    "ქართული ენა ՀԱՅԵՐԵՆ հայերեն አማርኛ ᏣᎳᎩ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕞𝕒𝕥𝕙 𝒮𝒸𝓇𝒾𝓅𝓉 𐍈 𠜎 𒀀",
    "Mixed: ABCабвαβγ123abc汉字ひらがな",
    "ʻOkina, Kʼicheʼ, ħəˈləʊ [ɪntəˈnæʃənəl]",
    "ελληνικά/русский-עברית_中文",
)

_CONTRACTIONS: Final = (
    "I'm you're he's she'd we'll they've it isn't",
    "I'M YOU'RE HE'S SHE'D WE'LL THEY'VE IT ISN'T",
    "I'm'd'll've't're's",
    "'s 't 'm 'd 'll 've 're 'S 'LL 'Ve 'rE",
    "rock'n'roll o'clock d'être l'école dell'arte",
    "don’t can’t it’s ‘quoted’ “double”",
    "'tis the '90s; y'all'd've",
    "HELLO'STOP can'tt x's1 'sx",
    "a'b c' 'd e''f '''g",
    "Ankara'nın İstanbul'da",
    "'ſ 'K long s and Kelvin",
)

_DIGITS: Final = (
    *("9876543210123"[:n] for n in range(1, 14)),
    "1 12 123 1234 12345 123456 1234567 12345678",
    "1,234,567.89 3.14159 -42 +7 1e-10 0x1F 0b1010 0o777",
    "a1b22c333d4444e55555",
    "2024-03-15T12:34:56.789Z",
    "192.168.0.1:8080 ::1 v1.2.3-rc4",
    "call +1 (555) 010-9999 or 00 44 20 7946 0000",
    "½1²3 ①② ⅫⅨ ٣٤٥ ४५६ ๗๘ 一二三 １２３４５６",
    "100% $5.00 €20 £3 ¥500 ₹10 #1 @2 &3 *4",
    "000111222333 00 0 0000",
    "x=1;y=22;z=333",
    " 7 77 777 7777",
)

_SPACES: Final = (
    " ", "  ", "   ", "    ", "        ", " " * 15, " " * 16, " " * 17, " " * 33, " " * 64, "\t", "\t\t",
    "\t\t\t\t\t", "\n", "\n\n", "\n\n\n", "\n" * 9, "\r", "\r\n", "\r\n\r\n", "\n\r", "\n \n", " \n ", "\t\n\t",
    " a", "  a", "   a", "    a", "a ", "a  ", "a   ", "a b", "a  b", "a   b", "a    b", "a     b", "a\tb",
    "a\t\tb", "a \tb", "a\t b", "a\nb", "a\n\nb", "a\n\n\nb", "a \nb", "a\n b", "a  \n  b", "a\r\nb", "a\r\n\r\nb",
    "a\rb", "a \r\n b", "a\n\n\n\n  \n\n b", "\n a", "\n\n  a", "\na", " \n\n\n a", "\ta", "\t a", " \ta",
    "line one\n    indented\n\tTabbed\n  \n\nlast  \n", "trailing spaces   \ntrailing tab\t\n",
    "word" + " " * 20 + "word", "x" + "\n" * 12 + "y", "x" + "\t" * 12 + "y", "x" + " \n" * 6 + "y",
    "1  2   3    4", "!  ?   .", "a\u00a0b", "\u00a0", "a\u00a0\u00a0b \u00a0c", "a\u2003b\u2009c\u3000d",
    "a\u2028b\u2029c", "\x0b\x0c", "a\x0bb\x0cc", "a\x85b", "\u1680a",
)  # fmt: skip

_SYMBOLS: Final = (
    "!", "?", "...", "....", "?!?!", "!!!!!!!!!!", "-----", "=====", "~~~~", "****", "____", "####", "////",
    "\\\\\\\\", "a.b,c;d:e!f?g", "(a)[b]{c}<d>", "((()))", "[[[]]]", "{{}}", "<<>>", "<|x|>", "$$$", "@@@", "%%%",
    "^^^", "&&&", "|||", "+++", "```", "``", "\"quoted\" 'single' `tick`", "a--b—c–d…e", "¿Qué? ¡Sí!",
    "«guillemets» „unten“ ‚x‘", "、。！？：；「」『』（）", "→ ← ⇒ ⇔ ≤ ≥ ≠ ≈ ∞ ∑ ∫ √ ∂ ∇ ∈ ∀ ∃",
    "α²+β²=γ² E=mc² a₁₂ xⁿ", "∀x∈ℝ: x²≥0 ∧ ¬(x≠x)", "$\\frac{a}{b}$ \\begin{align}x&=1\\\\\\end{align}",
    "© ® ™ § ¶ † ‡ • ‰", "█▓▒░ ┌─┐│└┘ ▁▂▃", "▁", "▁▁", "a▁b", "Ġ", "Ċ", "##ing", "<0x0A>",
    "_x_ __init__ snake_case_name", "CamelCase camelCase HTTPServer XMLHttpRequest iPhone eBay",
    "UPPER lower Title MiXeD", "a/b\\c|d", "/usr/local/bin:/opt/x", "C:\\Users\\me\\file.txt", "foo@example.org",
    "https://example.org/a/b?q=1&r=%20x#frag", "www.example.co.uk/~user/index.html", "ftp://[::1]:21/",
    "#hashtag @mention r/sub", "- item\n* item\n1. item\n", "----\n\n----\n", "=>\n//\n#\n/\n", ".\n\n?\r\n!\n\n\n",
    "a,\nb.\n\nc;\r\n", "/\n/\n//\n\n/// x", "....\n  ....",
)  # fmt: skip

_EMOJI: Final = (
    "😀", "😀😀😀", "hi 😀 there", "👍🏽👎🏿", "👨‍👩‍👧‍👦", "🏳️‍🌈🏴‍☠️", "🇫🇷🇯🇵🇧🇷", "❤️ ♥ ☺️ ☎", "🤷🏻‍♀️!",
    "a😀b1😀2", "1️⃣2️⃣#️⃣", "🫠🪿🩷", "zero\u200bwidth\u200cjoiner\u200dmarks\ufeff", "\u200b", "\ufeffBOM first",
    "soft\u00adhyphen", "rtl \u202eoverride\u202c mark\u200f", "\u2060x\u2061y", "\u0301", "a \u0301b",
    "\u0301\u0301 x", "\U000e0041\U000e007f", "\ue000\uf8ff private", "\U0010ffff", "\ufffd",
    "a\x01b\x02\x1b[0m\x7f",
)  # fmt: skip

_CODE: Final = (
    'def f(x: int) -> str:\n    """Doc."""\n    return f"{x:>10}"  # comment\n',
    "for i in range(10):\n\tif i % 2 == 0:\n\t\tprint(i)\n",
    "class Foo(Bar):\n\n    def __init__(self, *args, **kwargs):\n        super().__init__(*args, **kwargs)\n",
    '#include <stdio.h>\nint main(void) {\n    printf("%d\\n", 1 << 3);\n    return 0;\n}\n',
    "template <typename T> auto f(T&& x) -> decltype(x) { return std::move(x); }",
    "const f = async (a, b = 1) => { await g(`${a}-${b}`); return a ?? b?.c; };",
    "fn main() -> Result<(), Box<dyn Error>> {\n    let v: Vec<u8> = vec![0; 16];\n    Ok(())\n}",
    "SELECT u.id, COUNT(*) AS n FROM users u WHERE u.name LIKE '%x%' GROUP BY 1 HAVING n > 10;",
    'package main\n\nimport "fmt"\n\nfunc main() {\n\tfmt.Println("hi")\n}\n',
    "public static void main(String[] args) { System.out.println(args.length); }",
    "$ git log --oneline | grep -E '^[0-9a-f]{7}' && echo \"done\" > /dev/null 2>&1",
    "<div class=\"a b\" id='c'>text &amp; more<br/></div><!-- note -->",
    ".a > b:hover, #c::after { margin: 0 auto !important; color: #ff00aa }",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}, "ü": "\\u00fc"}',
    "key: value\nlist:\n  - a\n  - b: 1\n# comment\n",
    "| a | b |\n|---|:-:|\n| 1 | `x` |\n",
    "# Title\n\n## Sub\n\nSome *emphasis*, **strong**, [link](http://x.y) and `code`.\n\n```python\nx = 1\n```\n",
    "if(a&&b||!c){x+=1;y-=2;z*=3;w/=4;q%=5;r^=6;s|=7;t&=8;u<<=9;v>>=1;}",
    "import os,sys;[x for x in y if x!=0];lambda:0;a[1:-1:2]",
    "<html>\n  <body>\n    <p>\n      x\n    </p>\n  </body>\n</html>",
    "diff --git a/x b/x\n@@ -1,3 +1,4 @@\n-old\n+new\n",
    "(define (fact n) (if (= n 0) 1 (* n (fact (- n 1)))))",
    "main :: IO ()\nmain = mapM_ print $ filter even [1..10]",
    "\\documentclass{article}\n\\usepackage[utf8]{inputenc}",
    "^(?:[a-z0-9!#$%&'*+/=?^_`{|}~-]+)@(?:[a-z]+\\.)+[a-z]{2,}$",
    "0000:00:1f.3 Audio device [0403]: 8086:a0c8 (rev 20)",
    "ERROR 2024/01/02 03:04:05 pid=123 msg=\"can't open '/tmp/x': No such file\"",
    "U+1F600 \\u{1F600} &#128512; %F0%9F%98%80",
    "MOV R0, #0x10\nLDR R1, [R2, #4]!\nBNE .loop",
    "aGVsbG8gd29ybGQhIQ== 5d41402abc4b2a76b9719d911017c592",
)

_PROSE: Final = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside.",
    "In 1969, Apollo 11 landed on the Moon; Neil Armstrong's first words were heard by 600 million people.",
    "The recipe calls for 2½ cups of flour, 1/4 tsp. salt & 3 eggs (beaten).",
    "Dr. Smith vs. Mr. Jones, Ph.D., et al., i.e. the U.S.A. and e.g. the U.K.",
    "WHAT?! No... I don't think so -- \"never\", he said; 'maybe'.",
    "Q: Is it raining?\nA: No, it isn't.\n\nQ: Sure?\nA: Yes.",
    "User: Hello!\n\nAssistant: Hi there, how can I help you today?\n\n",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft", "supercalifragilistic" * 8,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "abababababababababababababababababab",
    "xyzzy" * 30, "hahaha", "AAAAaaaaAAAAaaaa", "tHiS iS mOcKiNg TeXt",
    "Le cœur a ses raisons que la raison ne connaît point.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío, añoraba a su querido cachorro.",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
    "O próximo vôo à noite sobre o Atlântico põe freqüentemente o único médico.",
    "Vår snällaste räv jagar den fyllda höna på gården.", "Pchnąć w tę łódź jeża lub ośm skrzyń fig.",
    "Kami membaca buku-buku itu kemarin; mereka tidak.", "Ninapenda kusoma vitabu. Habari za asubuhi?",
    "word1word2 word_3 word-4 word.5 word/6", "the the the The THE tHe", " the", "the ", "\nthe", "\n the",
    "end.Start end,Start end;Start end:Start end!Start", "a" * 120, "é" * 40, "中" * 40, "1" * 40, "." * 40, "",
    "a", "A", "é", "中", "0", "\x00",
)  # fmt: skip

STRINGS: Final[tuple[str, ...]] = tuple(
    dict.fromkeys(
        s
        for group in (_PROSE, _SCRIPTS, _CONTRACTIONS, _DIGITS, _SPACES, _SYMBOLS, _EMOJI, _CODE)
        for s in group
        if "\0" not in s
    )
)
"""Each is a place where two tokenizers have been seen to part. No string holds NUL: the runtime takes C strings."""


TEXT: Final[str] = """\
# Keeping a garden record

A garden record is a plain book in which one person writes down what happened in one garden. It needs no method to
begin with: the date, the weather, what was sown, what came up, what was eaten by slugs. After two or three years
the entries start to answer questions. When did the last frost come? Which bed dried out first? Was the early
variety really earlier, or did it only seem so because the spring was warm? Nobody remembers such things well.
Memory keeps the exceptions, the storm and the record marrow, and forgets the ordinary weeks in between.

The first rule is to write on the day itself. Notes made a week later are mostly guesses, and the guesses lean
towards what the writer expected. The second rule is to write down failures. A row of carrots that never appeared
teaches more than a row that did, provided one also noted the depth, the soil and the rain. The third rule is to be
brief. A record of twelve words a day will still be kept in November; a record of two pages will be abandoned before
the beans are tied up.

Numbers help, but only a few of them. A rain gauge costs little, and a thermometer that remembers the lowest reading
of the night costs not much more. With these two, and a habit of looking, one can explain most of what goes on
between March and October. Weighing the harvest is pleasant but less useful than it sounds, because the weight
depends on when one picks. Counting is better: forty plants set out, thirty-one alive after a fortnight, twenty-six
that bore fruit.

## Measuring rain

Suppose the gauge is read every morning and the figure is typed into a file, one line a day, with the date first. A
short program then gives the totals. It is written here in Python, since that is what most people have at hand, but
nothing in it depends on the language.

```python
from collections import defaultdict
from pathlib import Path


def monthly_totals(path: Path) -> dict[str, float]:
    '''Millimetres of rain for every month, from lines such as `2023-04-17 3.5`.'''
    totals: dict[str, float] = defaultdict(float)
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            day, amount = line.split()
            totals[day[:7]] += float(amount)
        except ValueError:
            raise SystemExit(f"{path}:{number}: expected a date and a number, found {line!r}")
    return dict(totals)


if __name__ == "__main__":
    for month, total in sorted(monthly_totals(Path("rain.txt")).items()):
        print(f"{month}  {total:6.1f} mm  {'*' * round(total / 5)}")
```

The stars make a crude picture, which is often all one wants. If the file grows to ten years, the program still runs
in a moment, and the longest part of the work remains what it was at the beginning: going outside in the wet and
looking at a glass tube.

## What the weather does to seeds

A seed is a small plant that has stopped. It holds enough food to push a root down and a shoot up, and it waits
until there is enough water, enough warmth and, for some kinds, enough light. If one of the three is missing it goes
on waiting. If water comes without warmth, the seed swells and then rots, which is the usual fate of beans sown too
early. If warmth comes without water, nothing happens at all, and that is why a dry April does less harm than a cold
and wet one.

The temperature that counts is that of the soil, not of the air. Soil warms slowly and cools slowly. At a depth of
ten centimetres the warmest hour is in the early evening and the coldest soon after sunrise, and a single hot
afternoon makes hardly any difference. Three mild nights do more. This is worth knowing, because people sow on the
first fine Saturday and are then surprised. A bed covered with dark cloth for two weeks can be four degrees warmer
than the bed beside it, and four degrees are the difference between eight days and twenty.

| crop    | lowest soil temperature | days at 10 degrees | days at 18 degrees |
|---------|------------------------:|-------------------:|-------------------:|
| lettuce |                       3 |                 11 |                  4 |
| pea     |                       4 |                 14 |                  8 |
| carrot  |                       5 |                 18 |                  9 |
| bean    |                      10 |                 20 |                  9 |
| pumpkin |                      13 |                  - |                  8 |

These figures are rough. They come from one garden with heavy soil, and a neighbour with sand would find others.
That is the point of keeping a record: the tables in books are averages over places where one does not live.

## A conversation over the fence

"You have put your onions out already," said the old man from number nineteen. He had been watching for some time.

"Last Sunday," Maria said. "The book says the second half of March."

"The book was printed in another county." He pointed with his pipe at the hill, where a thin line of snow still lay
under the hedge. "While that is white, I keep mine indoors. My father did the same, and he never lost an onion. He
lost plenty of other things, mind you. Two wheelbarrows, and once a cow."

Maria laughed, but that evening she wrote in her book: *19 March, onions out, snow on the hill.* On the 2nd of April
she added: *Eleven of sixty gone soft. Wait for the hill.* The following year she waited, and the year after that
she did not need to look up why. Her daughter, who liked to have things settled, drew a small graph of it on the
inside of the cover: the date on which the snow went, the date on which the onions were planted, and how many of
them lived. There were only five points, and two of them lay nearly on top of each other, so that no statistician
would have been impressed. It was enough for onions.

## On giving things up

Some questions a record cannot answer. Whether the new potatoes tasted better before the war is one; whether the
blackbird on the ridge is the same blackbird as last year is another. A person can also write so much that there is
no time left to dig. The best-kept book in our village belonged to a man whose garden was, to be honest, a
wilderness of thistles, and he was perfectly happy with it. He knew to the day when each thistle had opened. What he
was keeping, he used to say, was not a record of the garden but a record of having paid attention, and in that
respect it had been an excellent harvest.
"""
"""English prose, a table and some code, for a quick perplexity; about 6,000 characters, written for this project."""


class Special(Protocol):
    """What `parity_strings` needs to know of a vocabulary."""

    @property
    def added_texts(self) -> Sequence[str]: ...
    @property
    def lead(self) -> str: ...


def parity_strings(vocabulary: Special, limit: int = 48) -> list[str]:
    """STRINGS, and its special and added tokens in text: alone, embedded, adjacent, between spaces and line ends.

    Of many added tokens (256 reserved ones, 6,000 placeholders) the first and an even selection of the rest are taken.
    Where a vocabulary sees every text behind a `lead`, the strings come with it, too.
    """
    texts = [t for t in vocabulary.added_texts if t and "\0" not in t]
    texts, rest = texts[: limit // 2], texts[limit // 2 :]
    texts += rest[:: max(1, -(-len(rest) * 2 // limit))]
    made = [form.replace("@", t) for t in texts for form in _AROUND]
    made += [f"{a}{b}" for a, b in itertools.pairwise(texts)]
    made += [f"{a} x {b}\n{a}" for a, b in itertools.pairwise(texts)][: limit // 2]
    if texts:
        made.append("".join(texts[:20]))
        made.append(" ".join(texts[:20]))
    led = [vocabulary.lead + s for s in STRINGS] if vocabulary.lead else []
    return list(dict.fromkeys([*STRINGS, *led, *made]))


_AROUND: Final = ("@", "@word", "word@", "a @ b", "@\n", "\n@\n\nNext", "@@", "@ @", "1@2")
