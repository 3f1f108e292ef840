"""The glyph tasks' letters and fonts: the characters that are classes, the packages with fonts.

Debian's fonts come in the release's version; those of npm (Fontsource) are pinned.
"""

from __future__ import annotations

from benchmarks.common.sources import Source


def apt(*names: str) -> tuple[Source, ...]:
    """Debian packages by name."""
    return tuple(Source("apt", name) for name in names)


def characters(first: int, last: int, without: str = "") -> str:
    """All characters between two code points (inclusive), except those of `without`."""
    letters = (chr(code) for code in range(first, last + 1))
    return "".join(letter for letter in letters if letter not in without)


def npm(scope: str, pins: str) -> tuple[Source, ...]:
    """Lines of `name version sha256` as npm packages `<scope>/<name>`."""
    rows = [line.split() for line in pins.strip().splitlines()]
    return tuple(
        Source("npm", f"{scope}/{name}", version, digest) for name, version, digest in rows
    )


def _fontsource(pins: str) -> tuple[Source, ...]:
    return npm("@fontsource", pins)


WIDE_FONTS = apt("fonts-freefont-ttf", "fonts-dejavu-core", "fonts-dejavu-extra")

# The 42 consonants in use today.
THAI = characters(0x0E01, 0x0E2E, without="ฃฅฤฦ")
THAI_FONTS = (
    *apt("fonts-arundina", "fonts-freefont-ttf"),
    *apt(
        *(
            f"fonts-tlwg-{name}-ttf"
            for name in (
                *("garuda", "kinnari", "laksaman", "loma", "mono", "norasi", "purisa", "sawasdee"),
                *("typewriter", "typist", "typo", "umpush", "waree"),
            )
        )
    ),
    *_fontsource("""
        anuphan            5.3.0 7902b5f85a4b1f52dc208aeeabaea0b43bda55c3e72d09d216caba5a99ab8da3
        bai-jamjuree       5.3.0 538344c66c45801563eb0b92a2bbeb09af9c09ae43176d0530311860a1bc69e0
        chakra-petch       5.3.0 6a98a7d53cc1daedd1ff69490e96efd5c832c0889fc2353b178dcc56004503c8
        fahkwang           5.3.0 b03cb2ddff3ba0794195adee5f83ec773c76355f8ea77aebf3bb1c2716f93e84
        ibm-plex-sans-thai 5.3.0 5ca89cc99ea11b8ee264f9b9dc5deae8a448693cbc2a467a3719146230f3ffd4
        itim               5.3.0 2b6f41d05eae237d51e51e69099993e2864d9c61a0015cb908b73850000f1e2e
        k2d                5.2.8 78b22c0133ee3fa1d2776747a39d488a739c5efa3b1230d2e02ab8a49875d4fd
        kanit              5.3.0 12c3e3753d6539a9380ae11252f49a34e7defe5cb07b6e0ec3af18b13268eeb4
        mali               5.3.0 391b86c08e567a8537c0cf6aad7298f5e4c54e0ab7652d046b44678f01f7fbd0
        noto-sans-thai     5.3.0 263b3705d8dd9e3a24d267b2a2832d2252c81737f7aa45eec2ae57f87e8ad7aa
        noto-serif-thai    5.3.0 3f7bccec3fd7d62ba8ac5470c0f10d648d48c58a50c244d91e657ab5150410f2
        prompt             5.3.0 0f90eb2a11aab61f23ec25135907ac0e4ac8f7c1d5687f24e2ffe3b04055590b
        sarabun            5.3.0 7b5cca5fc0b9fb2e9ef70e43a55302cbab3308d4bd4b3b8d9a3263e287331686
        sriracha           5.3.0 934c3629d255c4f86f66b218cdefef90d6328727be5036fc28f953ac53a7b6f4
        taviraj            5.3.0 46b17315606d768b38961bff02f0b36fd5d7ed8fa694dbe3bfaaed10236fd20e
    """),
)

# The 33 letters of the modern alphabet.
GEORGIAN = characters(0x10D0, 0x10F0)
GEORGIAN_FONTS = (
    *apt("fonts-bpg-georgian"),
    *WIDE_FONTS,
    *_fontsource(
        "noto-sans-georgian 5.3.0 9aa744e7482a6a7eb8ed8139208d6e430c62c20637c8eff0ce15358f3b5c3e9c"
    ),
)

# The fourteen plain consonants, each with the vowels a and o: 28 syllables.
HANGUL = "".join(
    chr(0xAC00 + 588 * consonant + 28 * vowel)
    for vowel in (0, 8)
    for consonant in (0, 2, 3, 5, 6, 7, 9, 11, 12, 14, 15, 16, 17, 18)
)
HANGUL_FONTS = apt(
    *("fonts-alee", "fonts-baekmuk", "fonts-lexi-gulim", "fonts-lexi-saebom", "fonts-nanum"),
    *("fonts-unfonts-core", "fonts-unfonts-extra", "fonts-woowa-bm"),
)

# The 46 of the traditional table without those out of use, n last.
HIRAGANA = (
    "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをん"
)
HIRAGANA_FONTS = apt(
    *("fonts-aoyagi-kouzan-t", "fonts-aoyagi-soseki", "fonts-dejima-mincho", "fonts-horai-umefont"),
    *("fonts-ipaexfont-gothic", "fonts-ipaexfont-mincho", "fonts-kiloji", "fonts-komatuna"),
    *("fonts-konatu", "fonts-misaki", "fonts-mona", "fonts-monapo", "fonts-motoya-l-cedar"),
    *("fonts-motoya-l-maruberi", "fonts-oradano-mincho-gsrr", "fonts-reggae", "fonts-seto"),
    *("fonts-sawarabi-gothic", "fonts-sawarabi-mincho", "fonts-umeplus", "fonts-vlgothic"),
    *("fonts-woowa-bm", "fonts-nanum", "fonts-unfonts-core", "fonts-yozvox-yozfont-cute"),
)

# Both cases of the modern alphabet, without the final sigma: 48 letters.
GREEK = characters(0x0391, 0x03A9, without="\u03a2") + characters(0x03B1, 0x03C9, without="ς")
# Both cases of the Russian alphabet without yo: 64 letters.
CYRILLIC = characters(0x0410, 0x044F)
EUROPEAN_FONTS = (
    *WIDE_FONTS,
    *apt(
        *("fonts-cmu", "fonts-comfortaa", "fonts-ebgaramond", "fonts-fantasque-sans"),
        *("fonts-firacode", "fonts-gfs-artemisia", "fonts-gfs-didot", "fonts-gfs-neohellenic"),
        *("fonts-go", "fonts-hack", "fonts-jetbrains-mono", "fonts-jura", "fonts-junicode"),
        *("fonts-liberation", "fonts-linuxlibertine", "fonts-mononoki", "fonts-open-sans"),
        *("fonts-oldstandard", "fonts-paratype", "fonts-play", "fonts-roboto-unhinted"),
        *("fonts-sil-charis", "fonts-sil-gentium", "fonts-tuffy", "fonts-vollkorn"),
    ),
)

# As HIRAGANA, in the other syllabary, of which the same fonts have both.
KATAKANA = (
    "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワヲン"
)

# The 22 letters and the five final forms.
HEBREW = characters(0x05D0, 0x05EA)
HEBREW_FONTS = (*WIDE_FONTS, *apt("culmus", "culmus-fancy", "fonts-sil-ezra"))

# The 36 consonants.
MALAYALAM = characters(0x0D15, 0x0D39, without="ഩ")
MALAYALAM_FONTS = apt(
    *(
        f"fonts-smc-{name}"
        for name in (
            *("anjalioldlipi", "chilanka", "dyuthi", "gayathri", "karumbi", "keraleeyam"),
            *("manjari", "meera", "rachana", "raghumalayalamsans", "suruma", "uroob"),
        )
    ),
    *("fonts-lohit-mlym", "fonts-samyak-mlym", "fonts-freefont-ttf"),
)

# The 33 consonants.
DEVANAGARI = characters(0x0915, 0x0939, without="ऩऱळऴऺऻ")
DEVANAGARI_FONTS = apt(
    *("fonts-deva-extra", "fonts-gargi", "fonts-kalapi", "fonts-lohit-deva", "fonts-nakula"),
    *("fonts-sahadeva", "fonts-samyak-deva", "fonts-sarai", "fonts-sil-annapurna"),
    *("fonts-freefont-ttf", "fonts-aksharyogini2", "fonts-yrsa-rasa"),
)

# Both cases; left out are lower-case letters that are their capitals once scaled (c k o p s u v w x
# z), and l, which many faces draw as I.
LATIN = characters(0x41, 0x5A) + "abdefghijmnqrty"
LATIN_FONTS = tuple(  # without Go's small capitals and Libertine's pictures of keys
    source for source in EUROPEAN_FONTS if source.name not in ("fonts-go", "fonts-linuxlibertine")
)

# What most text fonts have of currencies, mathematics and punctuation, each of its own shape.
SYMBOLS = "!?&@#$%*+={}[]§¶†‡©®€£¥¢±×÷¬∞∑√∫≈≠≤≥◊∂∏«»"

# The 33 consonants in use today.
KHMER = characters(0x1780, 0x17A2, without="\u179d\u179e")
KHMER_FONTS = (
    *apt("fonts-khmeros", "fonts-sil-mondulkiri", "fonts-sil-mondulkiri-extra"),
    *_fontsource("""
        hanuman         5.3.0 f32b980c2cac9fe3e0f2faf5d49ef7b5274b5807c8c10004bad8feb6f112c710
        kantumruy-pro   5.3.0 5a8a708b3fe9439e3e79b40370b0a6a76c63bc5a4068ad60d76268345242ae60
        koulen          5.3.0 63e1381f9726fd6b9352826db5736b405c09ec505b1ed1c75d6f251d1061f01f
        nokora          5.1.0 4b2a1c7b9982742c79319f51c504ef9b7483a3636dbed5793ee6529b65afb5a7
        noto-sans-khmer 5.3.0 aa26ae5e1d6ed84e55c329071d4233f29fa4209b77c55af7adaa8f09607a3c20
    """),
)

# The 34 consonants in use today.
TELUGU = characters(0x0C15, 0x0C39, without="\u0c29\u0c31\u0c34")
TELUGU_FONTS = apt("fonts-lohit-telu", "fonts-telu-extra", "fonts-teluguvijayam")

# The 18 consonants and four of those for borrowed words.
TAMIL = "கஙசஜஞடணதநனபமயரறலளழவஷஸஹ"
TAMIL_FONTS = (
    *apt("fonts-freefont-ttf", "fonts-lohit-taml", "fonts-lohit-taml-classical"),
    *apt("fonts-meera-inimai", "fonts-samyak-taml"),
    *_fontsource("""
        arima            5.1.0 262726131beca92d43a0298dd96335ab68cbf9e01cd269aaa1a239c777ded97b
        baloo-thambi-2   5.3.0 04f9999947598db5722674ac3440d0397f1364f97f3eef74c6a3709c49bd17c7
        catamaran        5.3.0 ef22e81ca1224c6ed423ff4b40a4ced657f59310f1db53783e10d45aad2d084a
        coiny            5.3.0 37e1bb07f2e43a44468f7a2c4b7a5c892a84d3ac0089646e2ac445e26ee141c5
        hind-madurai     5.3.0 098b7b2af1f40f368948f3917d8532fe3a598f328fa96939ea768b5cee031f8c
        kavivanar        5.3.0 c765f6374afbb1b8e8cb9fbf8b7355e3a9de0899a76d3b8aa61d35c4d1216e14
        mukta-malar      5.3.0 a6b686884baa5c2bc5cb56cf8aabed12804e1729f82820626c6a95577608ea91
        noto-sans-tamil  5.3.0 5cc0572ac50413ae1083a8cc5fe939ed2a287887decb54e1ca7c06cc82dcb312
        noto-serif-tamil 5.3.0 ac689616bdae5a84b6f053f3f8fd5d87f9dc0fe721907e298df9ed403a53ef00
        pavanam          5.3.0 38a4d962f42ccdfb049808664c603ff7507d38dd73bae25154c54904aa50c846
    """),
)
