"""The emoji that people compare, by number (specification, "SAS method: emoji"), with their names. Pure."""

from collections.abc import Iterable
from typing import NamedTuple


class Emoji(NamedTuple):
    symbol: str
    name: str


_TABLE = """
🐶 Dog,🐱 Cat,🦁 Lion,🐎 Horse,🦄 Unicorn,🐷 Pig,🐘 Elephant,🐰 Rabbit,🐼 Panda,🐓 Rooster,🐧 Penguin,🐢 Turtle,🐟 Fish,
🐙 Octopus,🦋 Butterfly,🌷 Flower,🌳 Tree,🌵 Cactus,🍄 Mushroom,🌏 Globe,🌙 Moon,☁️ Cloud,🔥 Fire,🍌 Banana,🍎 Apple,
🍓 Strawberry,🌽 Corn,🍕 Pizza,🎂 Cake,❤️ Heart,😀 Smiley,🤖 Robot,🎩 Hat,👓 Glasses,🔧 Spanner,🎅 Santa,👍 Thumbs Up,
☂️ Umbrella,⌛ Hourglass,⏰ Clock,🎁 Gift,💡 Light Bulb,📕 Book,✏️ Pencil,📎 Paperclip,✂️ Scissors,🔒 Lock,🔑 Key,
🔨 Hammer,☎️ Telephone,🏁 Flag,🚂 Train,🚲 Bicycle,✈️ Aeroplane,🚀 Rocket,🏆 Trophy,⚽ Ball,🎸 Guitar,🎺 Trumpet,🔔 Bell,
⚓ Anchor,🎧 Headphones,📁 Folder,📌 Pin
"""
TABLE = tuple(Emoji(*entry.strip().split(" ", 1)) for entry in _TABLE.split(","))


def named(numbers: Iterable[int]) -> tuple[Emoji, ...]:
    return tuple(TABLE[number] for number in numbers)
