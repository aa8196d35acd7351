"""Write the CSV files of a small invented bookshop: customers, books, and the stars that the ones gave the others.

    python examples/make_shop.py shop --customers 600 --books 80

Customers like two of six genres, and some books are better than others, so there is something to learn; a title's words
say what its genre is. Only the standard library is needed; the same seed writes the same files.
"""

import argparse
import csv
import random
from collections.abc import Iterable
from pathlib import Path

GENRES = {
    "crime": ["murder", "night", "inspector", "alibi", "shadow", "witness"],
    "romance": ["heart", "summer", "letters", "promise", "wedding", "kiss"],
    "space": ["orbit", "star", "colony", "engine", "signal", "comet"],
    "history": ["empire", "siege", "queen", "letters", "river", "war"],
    "garden": ["roses", "soil", "summer", "orchard", "herbs", "pond"],
    "kitchen": ["bread", "salt", "herbs", "oven", "soup", "feast"],
}
COUNTRIES = ("de", "fr", "jp", "us")
START = 1_700_000_000
"""Second (UTC) of the first day: 14 November 2023."""
DAYS = 90


def main(argv: list[str] | None = None) -> None:
    """Write the files and say how many lines they have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--customers", type=int, default=600)
    parser.add_argument("--books", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    books = [book(rng, number) for number in range(1, args.books + 1)]
    quality = {number: rng.gauss(0, 1) for number, _, _ in books}
    customers = [customer(rng, number) for number in range(1, args.customers + 1)]
    events = sorted(
        (event for one in customers for event in visits(rng, one, books, quality)), key=lambda event: event[2]
    )
    write(args.folder / "books.csv", ["book", "title", "genres"], books)
    write(args.folder / "customers.csv", ["customer", "country"], (one[:2] for one in customers))
    write(args.folder / "stars.csv", ["customer", "book", "second", "stars"], events)
    print(f"{args.folder}: {len(events):,} ratings of {len(books):,} books by {len(customers):,} customers")


def book(rng: random.Random, number: int) -> tuple[str, str, str]:
    """(id, title, genres): one or two genres, and a title of their words."""
    genres = rng.sample(list(GENRES), rng.choice([1, 1, 2]))
    words = [rng.choice(GENRES[rng.choice(genres)]) for _ in range(3)]
    return f"b{number}", f"The {words[0]} and the {words[1]} of {words[2]}", "|".join(genres)


def customer(rng: random.Random, number: int) -> tuple[str, str, list[str]]:
    """(id, country, the genres that are liked)."""
    return f"c{number}", rng.choice(COUNTRIES), rng.sample(list(GENRES), 2)


def visits(
    rng: random.Random,
    one: tuple[str, str, list[str]],
    books: list[tuple[str, str, str]],
    quality: dict[str, float],
) -> Iterable[tuple[str, str, int, int]]:
    """(customer, book, second, stars) of a customer's ratings: a few visits, several books at each."""
    name, _, liked = one
    unread = rng.sample(books, len(books))
    for _ in range(rng.randint(2, 8)):
        second = START + rng.randrange(DAYS * 86_400)
        for _ in range(rng.randint(2, 6)):
            number, _, genres = unread.pop()
            is_liked = any(genre in liked for genre in genres.split("|"))
            stars = 2.2 + 1.8 * is_liked + 0.4 * quality[number] + rng.gauss(0, 0.7)
            yield name, number, second, min(5, max(1, round(stars)))
            second += rng.randint(20, 600)


def write(path: Path, columns: list[str], rows: Iterable[tuple]) -> None:
    """A CSV file with a header."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
