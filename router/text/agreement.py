"""Whether a model that was given one tokenizer can be served with another.

Copies of one model come with tokenizer files that differ byte for byte: a GGUF file holds the
vocabulary and has it converted, a folder has the file of the training library. What counts is that
every id means the same, and that texts become the same ids.
"""

from router.text.tokenizer import Tokenizer

# What tokenizers are known to cut differently: spaces, numbers, contractions, cases, scripts that
# do without spaces, marks, emoji of several code points, code, and what looks like a control token.
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Hello,world!  Two  spaces,   three, and a trailing one ",
    " leading\n\n\nnew lines\r\n\tand tabs\t\t",
    "1 12 123 1234 12345 3.14159 -2,718,281 1e-9 0xFF 10:45 1/2",
    "I'm you're he'll they'd we've it's DON'T CAN'T o'clock 'quoted' \"text\"",
    "camelCase snake_case SCREAMING kebab-case HTTPServer2 v1.2.3-rc4+build5",
    "def f(x):\n    return {'a': [x ** 2 for _ in range(10)]}  # ok\n",
    '<div class="a b">&nbsp;</div> https://example.org/a?b=c&d=%20#e user@example.org',
    "Ünïcödé naïve façade Straße ŒUVRE ß İstanbul ĳ ﬁ",
    "e\u0301 vs \u00e9, n\u0303, \u1e9b\u0323, \uff21\uff22\uff23",
    "Быстрая коричневая лиса. Η γρήγορη αλεπού. שָׁלוֹם עולם. مرحبا بالعالم ١٢٣",  # noqa: RUF001
    "敏捷的棕色狐狸跳过了懒狗。速い茶色の狐カタカナ。빠른 갈색 여우. สวัสดีชาวโลก नमस्ते दुनिया",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 👍🏽 ☃️",
    "\u00a0\u2003\u200b\u200d\ufeff\u3000 spaces of other kinds",
    "a\x00b\x07c\x1b[0m \ufffd",
    "<s>[INST] <|im_start|>user\n<|endoftext|></s> <|eot_id|><start_of_turn>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ================ ............ !!!???",
    "∀x∈ℝ: x²≥0 ∧ ∑ᵢ aᵢ ≈ ½ → ∞ €5 £6 ¥7 § ¶ © ™",  # noqa: RUF001
)
# Control tokens that are tried; some vocabularies reserve hundreds.
CONTROLS_MAX = 64


def difference(one: Tokenizer, other: Tokenizer) -> str:
    """In what two tokenizers differ, in some words; empty if each can stand for the other.

    Ids that only one of them knows are no difference: files pad vocabularies to a round size. Takes
    about 5 microseconds for each token: use a thread.
    """
    shared = one.ids() & other.ids()
    for token in sorted(shared):
        if (text := one.token_text(token)) != (other_text := other.token_text(token)):
            return f"token {token} is {text!r} in one and {other_text!r} in the other"
    controls = sorted(shared & (one.special_ids | other.special_ids))[:CONTROLS_MAX]
    # A control token must be found in any text.
    for text in (*PROBES, *(f"a{one.token_text(token)} b" for token in controls)):
        if one.encode(text, False) != other.encode(text, False):
            return f"they cut {text!r} differently"
    return ""
