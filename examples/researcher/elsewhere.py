"""Labels of new.csv by plain transformers: runs where Sluiceway is not installed."""

import csv

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("model", trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained("model", trust_remote_code=True)
with open("new.csv", encoding="utf-8") as file:
    notes = [row["note"] for row in csv.DictReader(file)]
tokens = tokenizer(notes, padding=True, truncation=True, max_length=16, return_tensors="pt")
with torch.no_grad():
    probability, label = model(**tokens).logits.softmax(1).max(1)
for note, p, number in zip(notes, probability, label, strict=True):
    print(f"{note},{model.config.id2label[int(number)]},{p:.6f}")
