"""What the coffee review works on: files of a small roaster's shop, made up, and a language model that is pretended.

`write_files` makes the same files each time. `answer` knows the comments in them, takes its time and needs no network.
"""

import csv
import json
import random
import time
from datetime import date, timedelta
from pathlib import Path

PRODUCTS = {"House blend": 9.5, "Decaf": 11.0, "Kenya AA": 14.5, "Guji natural": 16.0}
COUNTRIES = {
    "Germany": ["Germany", "germany ", "DE", "Deutschland"],
    "France": ["France", "FR", " france"],
    "Netherlands": ["Netherlands", "NL", "Holland"],
}
COMMENTS = [  # text, in English, what it is about, how it sounds
    ("Der Kaffee kam drei Tage zu spät.", "The coffee came three days late.", "delivery", -1),
    ("Le paquet était ouvert à l'arrivée.", "The parcel was open when it arrived.", "delivery", -1),
    ("De Guji is geweldig!", "The Guji is great!", "taste", 1),
    ("Viel zu teuer geworden.", "Has become far too expensive.", "price", -1),
    ("Mein Lieblingskaffee, seit Jahren.", "My favourite coffee, for years.", "taste", 1),
    ("Le décaféiné a un goût de carton.", "The decaf tastes of cardboard.", "taste", -1),
    ("Snel geleverd, netjes verpakt.", "Delivered fast, packed neatly.", "delivery", 1),
    ("Das Abo lässt sich nicht pausieren.", "The subscription can't be paused.", "subscription", -1),
    ("Prix correct pour cette qualité.", "A fair price for this quality.", "price", 1),
    ("Het abonnement werkt prima.", "The subscription works fine.", "subscription", 1),
    ("Wieder die falsche Mahlung bekommen.", "Got the wrong grind again.", "delivery", -1),
    ("Un café rond, très bon en expresso.", "A round coffee, very good as espresso.", "taste", 1),
]


def tidy_country(text):
    """The country that somebody meant."""
    for country, spellings in COUNTRIES.items():
        if text.strip().lower() in {spelling.strip().lower() for spelling in spellings}:
            return country
    return "elsewhere"


def write_files(folder, *, customers=1500, seed=7):
    """Write customers.csv, orders.csv and comments.csv: two years of a shop, with what real files have wrong."""
    made_up, folder = random.Random(seed), Path(folder)
    folder.mkdir(exist_ok=True)
    people, orders = [], []
    for number in range(1, customers + 1):
        country = made_up.choices(list(COUNTRIES), [5, 3, 2])[0]
        subscribed = made_up.random() < 0.35
        joined = date(2024, 1, 1) + timedelta(days=made_up.randrange(365))
        people.append([f"c{number:04}", made_up.choice(COUNTRIES[country]), joined, "yes" if subscribed else "no"])
        pace = 14 if subscribed else made_up.choice([25, 40, 60])
        leaves = made_up.random() < (0.15 if subscribed else 0.4)
        day, last = joined, joined + timedelta(days=made_up.randrange(60, 500)) if leaves else date(2025, 12, 31)
        while day <= min(last, date(2025, 12, 31)):
            product, bags = (
                made_up.choice(list(PRODUCTS)),
                made_up.choices([1, 2, 3, 6], [5, 4, 3, 1] if subscribed else [6, 4, 2, 1])[0],
            )
            orders.append([f"c{number:04}", day, product, bags, _paid(made_up, bags * PRODUCTS[product])])
            day += timedelta(days=max(1, round(made_up.gauss(pace, pace / 4))))
    orders.sort(key=lambda order: order[1])
    rows = [[f"o{number:06}", *order] for number, order in enumerate(orders, 1)]
    rows += made_up.sample(rows, len(rows) // 100)  # sent twice
    for row in made_up.sample(rows, 25):
        row[1] = "c9999"  # nobody
    _write(folder / "customers.csv", ["customer", "country", "joined", "subscribed"], people)
    _write(folder / "orders.csv", ["order", "customer", "date", "product", "bags", "paid"], rows)
    _write(folder / "comments.csv", ["customer", "text"], [[f"c{made_up.randrange(1, customers):04}", c[0]] for c in COMMENTS])


def _paid(made_up, amount):
    """An amount as the three systems of the shop write it; now and then a gift."""
    if made_up.random() < 0.01:
        return "free"
    return made_up.choice([f"{amount:.2f}", f"€ {amount:.2f}", f"{amount:.2f} EUR".replace(".", ",")])


def _write(path, head, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def answer(prompt, *, seconds):
    """What the model says after `seconds`: English for 'Translate: ...', else JSON about the comment in the last line."""
    time.sleep(seconds)
    text = prompt.strip().splitlines()[-1].partition(":")[2].strip()
    known = next((comment for comment in COMMENTS if text in comment[:2]), None)
    if prompt.startswith("Translate"):
        return known[1] if known else text
    return json.dumps({"topic": known[2], "mood": known[3]} if known else {"topic": "other", "mood": 0})
