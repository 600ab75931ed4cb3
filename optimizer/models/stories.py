"""`model=stories`: a tiny Llama that the project trains itself, in seconds, on sentences from a
small grammar of its own. A real language model for tests and first steps: it predicts names,
pronouns and objects from what came before, and it can forget them.
"""

from __future__ import annotations

import random
from pathlib import Path

VERSION = 2
WIDTH, BLOCKS, HEADS, KV_HEADS, CONTEXT = 64, 4, 4, 2, 256
STEPS, BATCH, LENGTH, SEED = 80, 16, 96, 20261123

PEOPLE = {"Mia": "she", "Tom": "he", "Anna": "she", "Ben": "he", "Vera": "she", "Ivan": "he"}
THINGS = [
    "ball",
    "book",
    "lamp",
    "drum",
    "coat",
    "map",
    "key",
    "cup",
    "bell",
    "kite",
    "rope",
    "pen",
]
LOOKS = [
    "red",
    "blue",
    "green",
    "yellow",
    "black",
    "white",
    "old",
    "new",
    "small",
    "heavy",
    "lost",
]
PLACES = ["garden", "kitchen", "school", "forest", "river", "market", "attic", "harbour", "mill"]
MOODS = ["happy", "sad", "tired", "angry", "quiet", "proud", "afraid", "hungry"]
ACTS = ["smiled", "cried", "slept", "shouted", "ran", "waited", "sang", "laughed", "left"]
TIMES = ["one day", "then", "later", "at night", "in the morning", "after that", "soon"]


def sentence(rng: random.Random, who: str, other: str, thing: str) -> str:
    """One of many things that can happen, in words that are often free to vary."""
    he, look, place = PEOPLE[who], rng.choice(LOOKS), rng.choice(PLACES)
    mood, act, when = rng.choice(MOODS), rng.choice(ACTS), rng.choice(TIMES)
    count = rng.randint(2, 9)
    return rng.choice(
        [
            f"{who} had a {look} {thing} .",
            f"{when} {he} went to the {place} with the {thing} .",
            f"{who} met {other} near the {place} , and {other} wanted the {look} {thing} .",
            f'" you may not take it , " said {who} , so {other} did not take the {thing} .',
            f'" you may take it , " said {who} , so {other} took the {look} {thing} .',
            f"{other} gave {who} {count} coins , so {who} now had {count} coins .",
            f"{when} {who} was {mood} and {he} {act} .",
            f"the {thing} in the {place} was {look} , but {other} was {mood} and {act} .",
            f"because {he} was {mood} , {who} {act} near the {look} {place} .",
        ]
    )


def story(rng: random.Random) -> str:
    """One story of about 70 words: two people, one thing, seven things that happen."""
    first, second = rng.sample(sorted(PEOPLE), 2)
    thing = rng.choice(THINGS)
    pairs = [rng.choice([(first, second), (second, first)]) for _ in range(7)]
    return " ".join(sentence(rng, who, other, thing) for who, other in pairs)


def corpus(count: int, seed: int = SEED) -> list[str]:
    rng = random.Random(seed)
    return [story(rng) for _ in range(count)]


def train(folder: Path) -> None:
    """Train the tokenizer and the model, save both to `folder`. About 5 s; few steps on purpose: a
    longer training makes a model so sure of everything that no rounding hurts it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = corpus(2000)
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=256)
    tokenizer.train_from_iterator(texts, trainer)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = LlamaForCausalLM(config)
        ids = [i for text in texts for i in [1, *tokenizer.encode(text).ids, 2]]
        data = torch.tensor(ids)
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=STEPS)
        for _ in range(STEPS):
            starts = torch.randint(len(data) - LENGTH, (BATCH,))
            batch = torch.stack([data[s : s + LENGTH] for s in starts.tolist()])
            net(batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    net.half().save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
