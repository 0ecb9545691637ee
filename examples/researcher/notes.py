"""Notes of three kinds, the third one rare, as a csv with a few gaps, and new ones."""

import csv
import random

random.seed(0)
words = {
    "billing": ["invoice", "paid", "charge", "refund", "bill", "amount"],
    "delivery": ["parcel", "late", "courier", "arrived", "box", "door"],
    "praise": ["thanks", "great", "kind", "lovely", "happy", "helpful"],
}


def note(label: str) -> str:
    """Three words of a kind and two of another."""
    other = random.choice([name for name in words if name != label])
    return " ".join(random.choices(words[label], k=3) + random.choices(words[other], k=2))


labels = ["billing"] * 70 + ["delivery"] * 60 + ["praise"] * 20
random.shuffle(labels)
with open("notes.csv", "w", newline="", encoding="utf-8") as file:
    rows = csv.writer(file)
    rows.writerow(["note", "kind"])
    rows.writerows([note(label), label] for label in labels)
    rows.writerows([["", "billing"], ["no kind", ""]])
with open("new.csv", "w", newline="", encoding="utf-8") as file:
    rows = csv.writer(file)
    rows.writerow(["note"])
    rows.writerows([note(label)] for label in labels[:20])
