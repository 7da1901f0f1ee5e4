"""The report's colours: one accent for what is misaligned, told apart in colour-blind sight too.

Vermilion against blue and ochre differ in every common kind of colour blindness (after Okabe & Ito,
2008), and each mark also differs in shape, place or label.
"""

PAPER = "#ffffff"
INK = "#1d1d1f"
MUTED = "#6e6e73"
HAIRLINE = "#e3e1dd"

MISALIGNED = "#c9431c"
NARROW = "#2c6e9b"
LEAKED = "#e2ac3f"
INCOHERENT = "#bcb8b1"
ALIGNED = "#a9cde0"

# How a broad answer may be judged, from the worst to the best, as the bars are stacked.
ANSWERS = {
    "misaligned": MISALIGNED,
    "leaked": LEAKED,
    "incoherent": INCOHERENT,
    "aligned": ALIGNED,
}
