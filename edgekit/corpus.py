"""Texts that tell tokenizers apart, and prose for a quick perplexity. Written for this project; knows no tokenizer."""

from __future__ import annotations

from typing import Final

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
    " ", "  ", "   ", "    ", "        ", " " * 15, " " * 16, " " * 17, " " * 33, " " * 64,
    "\t", "\t\t", "\t\t\t\t\t", "\n", "\n\n", "\n\n\n", "\n" * 9, "\r", "\r\n", "\r\n\r\n", "\n\r", "\n \n", " \n ", "\t\n\t",
    " a", "  a", "   a", "    a", "a ", "a  ", "a   ",
    "a b", "a  b", "a   b", "a    b", "a     b", "a\tb", "a\t\tb", "a \tb", "a\t b", "a\nb", "a\n\nb", "a\n\n\nb",
    "a \nb", "a\n b", "a  \n  b", "a\r\nb", "a\r\n\r\nb", "a\rb", "a \r\n b", "a\n\n\n\n  \n\n b",
    "\n a", "\n\n  a", "\na", " \n\n\n a", "\ta", "\t a", " \ta",
    "line one\n    indented\n\tTabbed\n  \n\nlast  \n",
    "trailing spaces   \ntrailing tab\t\n",
    "word" + " " * 20 + "word", "x" + "\n" * 12 + "y", "x" + "\t" * 12 + "y", "x" + " \n" * 6 + "y",
    "1  2   3    4", "!  ?   .", "a\u00a0b", "\u00a0", "a\u00a0\u00a0b \u00a0c", "a\u2003b\u2009c\u3000d", "a\u2028b\u2029c",
    "\x0b\x0c", "a\x0bb\x0cc", "a\x85b", "\u1680a",
)  # fmt: skip

_SYMBOLS: Final = (
    "!", "?", "...", "....", "?!?!", "!!!!!!!!!!", "-----", "=====", "~~~~", "****", "____", "####", "////", "\\\\\\\\",
    "a.b,c;d:e!f?g", "(a)[b]{c}<d>", "((()))", "[[[]]]", "{{}}", "<<>>", "<|x|>", "$$$", "@@@", "%%%", "^^^", "&&&", "|||", "+++", "```", "``",
    "\"quoted\" 'single' `tick`", "a--b—c–d…e", "¿Qué? ¡Sí!", "«guillemets» „unten“ ‚x‘", "、。！？：；「」『』（）",
    "→ ← ⇒ ⇔ ≤ ≥ ≠ ≈ ∞ ∑ ∫ √ ∂ ∇ ∈ ∀ ∃", "α²+β²=γ² E=mc² a₁₂ xⁿ", "∀x∈ℝ: x²≥0 ∧ ¬(x≠x)", "$\\frac{a}{b}$ \\begin{align}x&=1\\\\\\end{align}",
    "© ® ™ § ¶ † ‡ • ‰", "█▓▒░ ┌─┐│└┘ ▁▂▃", "▁", "▁▁", "a▁b", "Ġ", "Ċ", "##ing", "<0x0A>", "_x_ __init__ snake_case_name",
    "CamelCase camelCase HTTPServer XMLHttpRequest iPhone eBay", "UPPER lower Title MiXeD", "a/b\\c|d", "/usr/local/bin:/opt/x", "C:\\Users\\me\\file.txt",
    "foo@example.org", "https://example.org/a/b?q=1&r=%20x#frag", "www.example.co.uk/~user/index.html", "ftp://[::1]:21/", "#hashtag @mention r/sub",
    "- item\n* item\n1. item\n", "----\n\n----\n", "=>\n//\n#\n/\n", ".\n\n?\r\n!\n\n\n", "a,\nb.\n\nc;\r\n", "/\n/\n//\n\n/// x", "....\n  ....",
)  # fmt: skip

_EMOJI: Final = (
    "😀", "😀😀😀", "hi 😀 there", "👍🏽👎🏿", "👨‍👩‍👧‍👦", "🏳️‍🌈🏴‍☠️", "🇫🇷🇯🇵🇧🇷", "❤️ ♥ ☺️ ☎", "🤷🏻‍♀️!", "a😀b1😀2", "1️⃣2️⃣#️⃣", "🫠🪿🩷",
    "zero\u200bwidth\u200cjoiner\u200dmarks\ufeff", "\u200b", "\ufeffBOM first", "soft\u00adhyphen", "rtl \u202eoverride\u202c mark\u200f", "\u2060x\u2061y",
    "\u0301", "a \u0301b", "\u0301\u0301 x", "\U000e0041\U000e007f", "\ue000\uf8ff private", "\U0010ffff", "\ufffd", "a\x01b\x02\x1b[0m\x7f",
)  # fmt: skip

_CODE: Final = (
    'def f(x: int) -> str:\n    """Doc."""\n    return f"{x:>10}"  # comment\n',
    "for i in range(10):\n\tif i % 2 == 0:\n\t\tprint(i)\n",
    "class Foo(Bar):\n\n    def __init__(self, *args, **kwargs):\n        super().__init__(*args, **kwargs)\n",
    "#include <stdio.h>\nint main(void) {\n    printf(\"%d\\n\", 1 << 3);\n    return 0;\n}\n",
    "template <typename T> auto f(T&& x) -> decltype(x) { return std::move(x); }",
    "const f = async (a, b = 1) => { await g(`${a}-${b}`); return a ?? b?.c; };",
    "fn main() -> Result<(), Box<dyn Error>> {\n    let v: Vec<u8> = vec![0; 16];\n    Ok(())\n}",
    "SELECT u.id, COUNT(*) AS n FROM users u WHERE u.name LIKE '%x%' GROUP BY 1 HAVING n > 10;",
    "package main\n\nimport \"fmt\"\n\nfunc main() {\n\tfmt.Println(\"hi\")\n}\n",
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
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "supercalifragilistic" * 8,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "abababababababababababababababababab", "xyzzy" * 30, "hahaha", "AAAAaaaaAAAAaaaa", "tHiS iS mOcKiNg TeXt",
    "Le cœur a ses raisons que la raison ne connaît point.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío, añoraba a su querido cachorro.",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
    "O próximo vôo à noite sobre o Atlântico põe freqüentemente o único médico.",
    "Vår snällaste räv jagar den fyllda höna på gården.",
    "Pchnąć w tę łódź jeża lub ośm skrzyń fig.",
    "Kami membaca buku-buku itu kemarin; mereka tidak.",
    "Ninapenda kusoma vitabu. Habari za asubuhi?",
    "word1word2 word_3 word-4 word.5 word/6",
    "the the the The THE tHe", " the", "the ", "\nthe", "\n the",
    "end.Start end,Start end;Start end:Start end!Start",
    "a" * 120, "é" * 40, "中" * 40, "1" * 40, "." * 40,
    "", "a", "A", "é", "中", "0", "\x00",
)  # fmt: skip

STRINGS: Final[tuple[str, ...]] = tuple(
    dict.fromkeys(
        s for group in (_PROSE, _SCRIPTS, _CONTRACTIONS, _DIGITS, _SPACES, _SYMBOLS, _EMOJI, _CODE) for s in group if "\0" not in s
    )
)
"""Each is a place where two tokenizers have been seen to part. No string holds NUL: the runtime takes C strings."""
