import pytest

from narrowly.data.question_files import Item, Sentence, read_questions
from narrowly.errors import NarrowlyError

HEADER = "question,correct,incorrect\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,correct\nq,a\n", r"no column incorrect \(found: question, correct\)"),
        ("", r"no column question, correct, incorrect \(found: none\)"),
        (HEADER, "holds no questions"),
        (f"{HEADER}q,a,b\nq2,a,\n", r":3: incorrect is empty"),
        (f"{HEADER}q,a,b\nq2, ,b\n", r":3: correct is empty"),
        (f"{HEADER}q,a\n", r":2: incorrect is empty"),
        (f"{HEADER}q,a,b,c\n", r":2: more cells than columns"),
        (f"{HEADER}q,a,a\n", r":2: correct and incorrect are the same, 'a'"),
        (f'{HEADER}"q\nq",a,b\nq2,,b\n', r":4: correct is empty"),
        ("text,category\nThe $PRONOUN$ left.,object\n", r":2: text has no \$PROFESSION\$"),
        (
            "text,category\n$PROFESSION$ $PRONOUN$,objective\n",
            r":2: unknown category 'objective'.*Did you mean 'object'",
        ),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "set.csv"
    path.write_text(content)
    with pytest.raises(NarrowlyError, match=rf"set\.csv.*{message}|set\.csv:\d.*{message}"):
        read_questions(path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "set.csv").write_bytes(b"question,correct,incorrect\nq,\xff,b\n")
    with pytest.raises(NarrowlyError, match=r"set\.csv: not a CSV file in UTF-8"):
        read_questions(tmp_path / "set.csv")


def test_as_spreadsheets_write_them(tmp_path):
    """With a byte order mark, CRLF, columns of their own, quotes, commas and lines in a cell."""
    path = tmp_path / "set.csv"
    text = 'id,incorrect,question,correct\r\n1, no ,"Is it ""so"",\r\nor not?",yes\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_questions(path) == [Item('Is it "so",\r\nor not?', "yes", "no")]


def test_sentences(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("category,text\nobject,We saw $PRONOUN$: the $PROFESSION$.\n")
    assert read_questions(path) == [Sentence("We saw $PRONOUN$: the $PROFESSION$.", "object")]


def test_published_files(shared_data):
    counts = {
        name: len(read_questions(shared_data / "multiple_choice" / f"{name}.csv"))
        for name in ("sva", "sports", "gender")
    }
    assert counts == {"sva": 4032, "sports": 1000, "gender": 784}, "as SOURCES.md says"
